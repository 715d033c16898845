"""The safetensors files of a folder in Hugging Face format, of which no more is in memory than what is asked for."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from cai_jax.errors import InputError
from cai_jax.files import read_json

WEIGHTS = ("F64", "F32", "F16", "BF16")  # other numbers are a quantised model's codes, which mean nothing without their scales


class Folder:
    """Where each tensor is, its shape and blocks of it. `left`: the tensors that nobody has asked for."""

    def __init__(self, path: str):
        self.path, single = Path(path), Path(path) / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            content = read_json(index)
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict) or any(not isinstance(f, str) or Path(f).name != f for f in names.values()):
                raise InputError(f"{index}: wanted a weight_map of tensors to files beside it; fetch it again")
            self.file = {name: self.path / file for name, file in names.items()}
        elif single.is_file():
            with self._open(single) as f:
                self.file = dict.fromkeys(f.keys(), single)
        else:
            raise InputError(
                f"no weights at {single}: wanted safetensors, one file or several with an index (--config.model.path)"
            )
        self.left = set(self.file)

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is thereby accounted for. Raises InputError when it is missing or not of floating numbers."""
        if name not in self.file:
            raise InputError(f"{self.path}: the tensor {name} is missing from its safetensors")
        self.left.discard(name)
        with self._open(self.file[name]) as f:
            if name not in f.keys():
                raise InputError(f"{self.file[name]}: the index says that {name} is here, and it is not; fetch both again")
            tensor = f.get_slice(name)
            shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if dtype not in WEIGHTS:
            raise InputError(
                f"{self.file[name]}: {name} is stored as {dtype}, wanted {', '.join(WEIGHTS)}; a quantised checkpoint is not "
                "read, give the one that it was made from (--config.model.path)"
            )
        return shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        with self._open(self.file[name]) as f:  # opened and closed each time: a mapped file counts as memory
            return f.get_slice(name)[index]
