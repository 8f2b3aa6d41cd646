"""`python pipelines/train_teacher.py ...` is `ddil-ray train-teacher ...`: for `ray job submit`."""

import sys

from ddil_ray.cli import main

if __name__ == "__main__":
    main(["train-teacher", *sys.argv[1:]])
