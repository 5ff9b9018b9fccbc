"""Tensors of a checkpoint folder of which a rank reads its share only.

The experts of the largest checkpoint are half a terabyte: eight ranks that read all of it to keep an eighth each would read
it eight times. Rows and columns are cut where the file is mapped, so that what belongs to other ranks is never copied.
"""

from __future__ import annotations

import torch

from modeling.load import TensorFiles


class ShareFiles(TensorFiles):
    """`TensorFiles` with runs of a dimension. bytes_read: of the tensors and runs handed out so far."""

    bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        found = super().read(name)
        self.bytes_read += found.nbytes
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, without reading it.

        Raises:
            ValueError: as `read`.
        """
        return tuple(self._mapped(name).get_shape())

    def run(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries start .. start + length - 1 of rows (dim 0) or columns (dim 1).

        Raises:
            ValueError: as `read`.
        """
        mapped = self._mapped(name)
        self._read.add(name)
        found = mapped[start:start + length] if dim == 0 else mapped[:, start:start + length]
        self.bytes_read += found.nbytes
        return found

    def _mapped(self, name: str):
        if name not in self._where:
            super().read(name)  # says what is missing
        return self._open(self._where[name]).get_slice(name)
