"""`python pipelines/serve.py ...` is `ddil-ray serve ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
