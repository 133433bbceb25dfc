"""Samples to token ids with the spans that carry loss."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

import numpy as np

from fireflyds import registry
from fireflyds.errors import UserError
from fireflyds.types import BOS, EOS, Encoder, Example, Sample, Segment

CHUNK = 256


def encode_document(encoder: Encoder, text: str) -> Example:
    """BOS (where the tokenizer has one), the text, EOS; loss on all but the first token."""
    ids = encoder.encode(text)
    if encoder.bos_id is not None:
        ids.insert(0, encoder.bos_id)
    if encoder.eos_id is not None:
        ids.append(encoder.eos_id)
    return Example(np.asarray(ids), ((0, len(ids)),), len(text.encode()))


def encode_segments(encoder: Encoder, segments: Sequence[Segment]) -> Example:
    """Segments are encoded one by one, so that a prompt has the same ids in training and in use.

    Raises:
        ValueError: the tokenizer has no such special token.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    num_bytes = 0
    continues = False
    for segment in segments:
        start = len(ids)
        if segment.special:
            ids.append(_special_id(encoder, segment.text))
        else:
            ids += encoder.encode(segment.text, continues=continues)
            num_bytes += len(segment.text.encode())
        continues = not segment.special
        if segment.learn and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], len(ids))
        elif segment.learn:
            spans.append((start, len(ids)))
    return Example(np.asarray(ids), tuple(spans), num_bytes)


def _special_id(encoder: Encoder, token: str) -> int:
    index = {BOS: encoder.bos_id, EOS: encoder.eos_id}.get(token, encoder.token_id(token))
    if index is None:
        name = {BOS: "BOS", EOS: "EOS"}.get(token, token)
        raise ValueError(f"the tokenizer has no special token {name}, which the template needs")
    return index


def encode_sample(encoder: Encoder, template: str, sample: Sample) -> Example:
    """A document, or a dialogue in the given template.

    Raises:
        ValueError: the dialogue does not fit the template, or the tokenizer lacks a special token of it.
    """
    if sample.text is not None:
        return encode_document(encoder, sample.text)
    chat = registry.find("fireflyds.data.templates", template).CHAT
    return encode_segments(encoder, chat.render(sample.messages))


def encode_all(
    load_encoder: Callable[[], Encoder], template: str, samples: Iterator[Sample], workers: int
) -> Iterator[Example | str]:
    """Encode in `workers` processes (0: one per core), in order; a sample that cannot be encoded gives its reason."""
    workers = workers or os.cpu_count() or 1
    chunks = iter(lambda: list(islice(samples, CHUNK)), [])
    if workers == 1:
        encoder = load_encoder()
        for chunk in chunks:
            yield from _encode_chunk(encoder, template, chunk)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(load_encoder,)) as pool:
        work = functools.partial(_encode_in_worker, template)
        try:
            # A bounded window of chunks under way keeps memory flat whatever the corpus size.
            waiting = [pool.submit(work, chunk) for chunk in islice(chunks, 4 * workers)]
            while waiting:
                yield from waiting.pop(0).result()
                waiting += [pool.submit(work, chunk) for chunk in islice(chunks, 1)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker_encoder: Encoder | None = None


def _start_worker(load_encoder: Callable[[], Encoder]) -> None:
    global _worker_encoder
    _worker_encoder = load_encoder()


def _encode_in_worker(template: str, samples: list[Sample]) -> list[Example | str]:
    assert _worker_encoder is not None
    return _encode_chunk(_worker_encoder, template, samples)


def _encode_chunk(encoder: Encoder, template: str, samples: list[Sample]) -> list[Example | str]:
    encoded: list[Example | str] = []
    for sample in samples:
        try:
            encoded.append(encode_sample(encoder, template, sample))
        except UserError:
            raise
        except ValueError as error:
            encoded.append(str(error))
    return encoded
