"""Where samples come from, how they are mixed and packed."""

from dataclasses import dataclass, field

ON_BAD_SAMPLE = ("mask", "refuse")
ON_CHANGE = ("refuse", "restart_sources")
MAX_PREFETCH_STEPS = 32  # of a rank; what a node plans is kept for twice as many


@dataclass(kw_only=True)
class FilterConfig:
    """Samples that could be used and are not wanted: left out and counted. None, false and [] leave nothing out.

    Of duplicates, within the source and its held-out samples, the first is kept.
    """

    min_side: int | None = None  # pixels, of every image
    max_aspect_ratio: float | None = None  # long side / short side, of every image
    min_characters: int | None = None  # of the text, or of all messages together
    max_characters: int | None = None
    languages: list[str] = field(default_factory=list)  # ISO 639; a guess, poor below some 50 characters
    exact_duplicates: bool = False  # of text and images together
    near_duplicate_texts: float | None = None  # from this similarity on (of sets of 8 characters in a row)
    near_duplicate_images: int | None = None  # all images differ in at most so many bits of a perceptual hash


@dataclass(kw_only=True)
class RawConfig:
    """What `data_tools.build` makes a source's shards of; docs/data.md describes each `format`.

    `file` holds the records, `images` is the folder that image names are relative to. `heldout_fraction` of the
    records, drawn by image, go to the source's `heldout`. `system` begins conversations without a system message.
    `packages` are Debian packages to fetch before, `limit` is how many records are used at most, drawn by place, and
    `fonts` are files and folders of fonts for pages, DejaVu where there is none.
    """

    format: str = "conversations"
    file: str = ""
    images: str = ""
    heldout_fraction: float = 0.0
    system: str = ""
    max_rejected_fraction: float = 0.01  # of the records; more that cannot be used stop the build
    filters: FilterConfig = field(default_factory=FilterConfig)
    packages: list[str] = field(default_factory=list)
    limit: int | None = None
    fonts: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class SourceConfig:
    """One folder of indexed shards, and one of held-out shards. `modality`: text or multimodal."""

    path: str = ""
    heldout: str | None = None
    modality: str = "text"
    raw: RawConfig | None = None


@dataclass(kw_only=True)
class AccessConfig:
    """How files of remote sources are fetched (http, https, s3, gs; docs/storage.md). Paths need none of it.

    A request that fails for a passing reason is repeated after `backoff_seconds`, then twice that, and so on.
    """

    fetch: str = "ranges"  # ranges: the samples asked for; shards: whole shards, into the cache
    cache: str | None = None  # a folder on the node's own disk, which all its processes share
    cache_bytes: int = 200_000_000_000  # it never holds more
    attempts: int = 7
    timeout_seconds: float = 60.0  # of one attempt
    backoff_seconds: float = 1.0


@dataclass(kw_only=True)
class DataConfig:
    """Sources and the rules that turn them into global batches.

    `text_ratio` and `warmup_fraction` shape the joint stage's mixture: the share of text-only global batches,
    and the part of the stage over which that share falls from 1 to it (paper, section 3.2.2).
    """

    name: str = ""
    root: str = ""  # the folder that `build_command` fills; paths are relative to the current folder
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = ""
    chat_template: str = "deepseek"
    bos_token: str = "<｜begin▁of▁sentence｜>"
    eos_token: str = "<｜end▁of▁sentence｜>"
    image_token: str = "<image_placeholder>"
    text_ratio: float = 0.7
    warmup_fraction: float = 0.1
    build_command: str = ""  # named in the error when the data is missing
    access: AccessConfig = field(default_factory=AccessConfig)

    lanes: int = 256
    shuffle_window: int = 4  # pieces of shards that a lane shuffles together
    packing_window: int = 96  # samples that a lane packs together
    max_carry_steps: int = 8  # a carried sample older than this many of its lane's batches is emitted first
    flush_steps: int = 256  # batches of its modality after which a lane has emitted all that it carries
    balance_lanes: int = 64  # neighbouring lanes whose rows are dealt to their ranks by cost; 0 deals none
    max_images_per_pack: int = 16
    image_rounding: str = "truncate"  # of a resized side: as the official code; "round" as transformers
    max_image_pixels: int = 50_000_000
    max_sample_bytes: int = 64_000_000
    on_bad_sample: str = "mask"  # one that cannot be used: mask its loss and count it, or refuse to go on
    max_failed_fraction: float = 0.01  # of the samples seen, once 100 were seen or 10 failed
    on_change: str = "refuse"  # on resume, where sources or mixture changed: refuse, or restart_sources
    prefetch_steps: int = 2
    workers: int = 4  # threads of a rank that read and decode; 0 leaves it to the one that prepares steps
