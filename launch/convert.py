"""Convert a checkpoint in its maker's own layout, or a quantised one, to a directory that transformers reads.

    python launch/convert.py model=Qwen-7B out=qwen-7b-hf template=qwen
    python launch/convert.py model=llama-2-7b-meta out=llama-2-7b
    python launch/convert.py model=DeepSeek-V3 out=deepseek-v3-bf16

Code that comes with a checkpoint is not run. Weights are converted one at a time, so memory holds one of them.
"""

import json
import shutil
from pathlib import Path

from fireflyds import app
from fireflyds.config import ConvertConfig
from fireflyds.errors import UserError
from fireflyds.fs import Output, atomic_dir


def convert(config: ConvertConfig) -> None:
    """Writes the converted checkpoint with its tokenizer.

    Raises:
        UserError: the layout is not known, a tensor does not fit, `out` is the checkpoint, or no such template.
    """
    from fireflyds.data.chat_template import find_template
    from fireflyds.export.older_readers import with_older_keys
    from fireflyds.models.convert.checkpoint import convert_checkpoint
    from fireflyds.models.convert.tokenizer import write_tokenizer_of
    from fireflyds.tokenizer.encoder import load_encoder
    from fireflyds.tokenizer.shards import save_sharded

    folder, out = Path(config.model), Path(config.out)
    if folder.resolve() == out.resolve():
        raise UserError("is the checkpoint to convert", key="out", value=out, remedy="Give another folder")
    converted = convert_checkpoint(folder)
    with atomic_dir(out, Output("convert")) as written:
        settings = json.dumps(with_older_keys(converted.config), ensure_ascii=False, indent=2)
        (written / "config.json").write_text(settings, encoding="utf-8")
        for pattern in ("generation_config.json", "*processor_config.json"):
            for file in folder.glob(pattern):
                shutil.copy2(file, written)
        has_tokenizer = write_tokenizer_of(folder, written, converted.kind)
        if config.template:
            if not has_tokenizer:
                raise UserError("there is no tokenizer", key="template", value=config.template, remedy="Leave it out")
            template = find_template(load_encoder(written), config.template)
            (written / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")
        save_sharded(written, converted.entries)
    parameters = sum(entry.num_bytes // entry.dtype.itemsize for entry in converted.entries.values())
    print(f"wrote {out}: {converted.config['model_type']} from {converted.kind}, {parameters:,} parameters")
    for note in converted.notes:
        print(f"note: {note}")
    if not has_tokenizer:
        print("note: there are no tokenizer files; give model.tokenizer= to what reads the model")
    elif converted.templates and not config.template and load_encoder(out).chat_template is None:
        print(f"note: it has no chat template; for a chat model give template={' or '.join(converted.templates)}")


if __name__ == "__main__":
    app.main(convert, __doc__)
