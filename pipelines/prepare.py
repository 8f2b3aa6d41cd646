"""`python pipelines/prepare.py ...` is `ddil-ray prepare ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
