"""`python pipelines/register.py ...` is `ddil-ray register ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["register", *sys.argv[1:]])
