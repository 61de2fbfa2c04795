"""posttrain's command line in a launched process, without the operation that DeepSpeed would compile first."""

import importlib.util
import sys

from posttrain.cli import main

if __name__ == "__main__":
    if importlib.util.find_spec("deepspeed"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.exit(main())
