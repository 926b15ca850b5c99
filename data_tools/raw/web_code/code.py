"""Which code and image make a sample (paper, section 2.1, Web Code)."""

from data_tools.raw.fields import unmarked
from data_tools.raw.format import RawSample, RecordError
from megatron_vl.data.sample import IMAGE_MARK

MIN_LINES = 5  # of code: neither blank nor comments


def code_sample(images: list[str] | list[bytes], code: str) -> RawSample:
    """One image, then the code that draws it. Raises RecordError for another number, or fewer than MIN_LINES."""
    if len(images) != 1:
        cause = "several images" if images else "no image"
        raise RecordError(cause, f"it draws {len(images)}; exactly one is needed")
    code = code.strip("\r\n")
    num_lines = sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in code.splitlines())
    if num_lines < MIN_LINES:
        raise RecordError("little code", f"{num_lines} lines of code; at least {MIN_LINES} are needed")
    return RawSample(fields={"text": IMAGE_MARK + unmarked(code)}, images=images)
