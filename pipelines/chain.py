"""`python pipelines/chain.py ...` is `ddil-ray chain ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["chain", *sys.argv[1:]])
