"""Names of weights in files of an architecture, as transformers reads them into its model."""

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class FileNames:
    """What transformers makes of the names of tensors in files of a model."""

    def __init__(self, model: Any) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def read_into(self, name: str) -> tuple[str | None, bool]:
        """The weight or buffer that a tensor of this name is read into, None for none; and whether it is converted,
        such as joined with others."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._weights)
        if renamed in self._weights:
            return renamed, pattern is not None
        unchanged, _ = rename_source_key(name, [], [], self._prefix, self._weights)
        return (unchanged if unchanged in self._weights else None), False
