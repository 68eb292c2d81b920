import subprocess
import sys


def test_torchvision_imports_in_a_fresh_interpreter() -> None:
    code = (
        "from hanse_common.vision.torchvision_compat import models, v2\n"
        "import torch\n"
        "assert models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)\n"
        "assert v2.RandomHorizontalFlip(1.0)(torch.tensor([[[1.0, 2.0]]])).tolist() == [[[2.0, 1.0]]]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_operators_that_did_load_keep_their_schemas() -> None:
    # What a torch with a matching torchvision looks like: the operators exist before the import.
    code = (
        "import torch\n"
        "from hanse_common.vision import torchvision_compat as first\n"
        "import importlib\n"
        "from unittest import mock\n"
        "with mock.patch('torch.ops.load_library') as load:\n"
        "    importlib.reload(first)\n"
        "assert load.called and first._library is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
