"""`python pipelines/sample.py ...` is `ddil-ray sample ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
