"""`python pipelines/ablation.py ...` is `ddil-ray ablate ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["ablate", *sys.argv[1:]])
