"""Read amplification of an epoch on 64 and 512 nodes: bytes that come over the network per byte that is used.

The order in which lanes read is that of `SourceDeal`; a node owns whole lanes, which advance side by side. Bytes
are counted, none are read. The samples of 4 nodes are followed, and the nodes are alike. Compared with a shuffle of
all samples over all nodes, for which every node fetches nearly every shard.

    python -m benchmarks.read_amplification
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Goal, print_goals, run_benchmark, table
from megatron_vl.data.deal import DealSettings, SourceDeal, SourceTable
from megatron_vl.data.hashing import permutation, random_words
from megatron_vl.data.plan_state import FIRST

ROW = 4096
WINDOW = 4  # data.shuffle_window
UNITS_PER_PACK = 4
TAR_BLOCK = 512
MAX_CACHED_DOCUMENTS = 32  # of units.py
FOLLOWED_NODES = 4
GOAL = 1.5
IMAGES, DOCUMENTS, BOTH = (
    "samples with images",
    "documents of 2 rows in the mean",
    "both, 7 rows of documents to 3",
)
RECOMMENDED = [(way, case) for way in ("shards", "ranges") for case in (IMAGES, BOTH)] + [
    ("shards", DOCUMENTS)
]

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes, and the shards of a source for each. A lane's packs may be run by any node of its group.

    `readers` ranks of a node read each sample, as those of one tensor-parallel group do.
    """

    num_nodes: int
    lanes_per_node: int = 4
    shards_per_lane: int = 8
    samples_per_shard: int = 512
    nodes_per_group: int = 1
    readers: int = 1
    cached_windows: float = 2.0  # of all lanes whose packs a node may run: what its cache has room for

    @property
    def lanes(self) -> int:
        return self.num_nodes * self.lanes_per_node

    @property
    def cached_shards(self) -> int:
        """Room of a node's cache."""
        return max(1, int(self.cached_windows * WINDOW * self.lanes_per_node * self.nodes_per_group))


class Corpus:
    """Samples with their sizes in bytes: of their files, and of the part of the shard that holds these.

    Multimodal samples have 1 to 3 images of 20 to 180 kB and fit a row; documents have 2 rows in the mean.
    """

    def __init__(self, num_shards: int, samples_per_shard: int, *, documents: bool) -> None:
        num = num_shards * samples_per_shard
        chance = random_words(1, 3 * num).reshape(3, num) / 2**64
        images = np.zeros(num, dtype=np.int64) if documents else 1 + (3 * chance[0]).astype(np.int64)
        tokens = -2 * ROW * np.log1p(-chance[1]) if documents else 200 + 600 * images * (0.5 + chance[1])
        self.tokens = np.maximum(1, tokens).astype(np.int64)
        text_bytes = 4 * self.tokens if documents else 200 + 4 * (self.tokens - 600 * images).clip(50)
        self.used_bytes = text_bytes + images * (20_000 + 160_000 * chance[2]).astype(np.int64)
        self.span_bytes = self.used_bytes + images * (
            TAR_BLOCK + TAR_BLOCK // 2
        )  # headers and padding between
        self.shards = np.repeat(np.arange(num_shards), samples_per_shard)
        self.shard_bytes = np.bincount(self.shards, self.span_bytes + TAR_BLOCK + TAR_BLOCK // 2).astype(
            np.int64
        )
        self.source = SourceTable(
            name="simulated",
            modality="text" if documents else "multimodal",
            num_samples=num,
            num_images=int(images.sum()),
            first_samples=np.arange(num_shards) * samples_per_shard,
            read=lambda start, stop: (self.tokens[start:stop], images[start:stop]),
            digest="",
        )

    def pieces(self, samples: Int64Array) -> Int64Array:
        """Units that each of the samples is cut into."""
        counts: Int64Array = -(-self.tokens[samples] // ROW)
        return counts


def ranges(corpus: Corpus, reads: list[Int64Array]) -> float:
    """Amplification of nodes that read the samples `reads` by ranges, a document again for each of its pieces."""
    fetched = used = 0.0
    for samples in reads:
        is_miss = misses(samples, MAX_CACHED_DOCUMENTS)
        fetched += corpus.span_bytes[samples[is_miss]].sum()
        used += (corpus.used_bytes[samples] / corpus.pieces(samples)).sum()
    return float(fetched / used)


def whole_shards(corpus: Corpus, reads: list[Int64Array], cached_shards: int) -> float:
    """Amplification of nodes that fetch whole shards into a cache of that many."""
    fetched = used = 0.0
    for samples in reads:
        shards = corpus.shards[samples]
        fetched += corpus.shard_bytes[shards[misses(shards, cached_shards)]].sum()
        used += (corpus.used_bytes[samples] / corpus.pieces(samples)).sum()
    return float(fetched / used)


def misses(keys: Int64Array, room: int) -> NDArray[np.bool_]:
    """Which of the accesses a least-recently-used cache with `room` for that many keys does not serve."""
    held: OrderedDict[int, None] = OrderedDict()
    missed = np.zeros(len(keys), dtype=bool)
    for place, key in enumerate(keys.tolist()):
        missed[place] = key not in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > room:
            held.popitem(last=False)
    return missed


def lane_reads(cluster: Cluster, corpus: Corpus) -> list[Int64Array]:
    """The samples that each of the first nodes reads in an epoch, in order, one for each unit."""
    settings = DealSettings(
        key=7, lanes=cluster.lanes, shuffle_window=WINDOW, sequence_length=ROW, max_images_per_pack=16
    )
    deal = SourceDeal(corpus.source, settings)
    per_group, reads = cluster.nodes_per_group * cluster.lanes_per_node, []
    for node in range(FOLLOWED_NODES):
        group, place = divmod(node, cluster.nodes_per_group)
        samples, owners = run_by(
            deal, range(group * per_group, (group + 1) * per_group), cluster.nodes_per_group
        )
        reads.append(samples[owners == place])
    return reads


def run_by(deal: SourceDeal, lanes: range, num_nodes: int) -> tuple[Int64Array, Int64Array]:
    """The samples of lanes that advance side by side, and by which of the group's nodes each is run.

    That is drawn for each pack, as what balances their costs may send a pack anywhere in the group.
    """
    orders = [_epoch(deal, lane) for lane in lanes]
    places = np.concatenate([np.arange(len(order)) for order in orders])
    lane_of = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
    packs = places // UNITS_PER_PACK * len(orders) + lane_of
    owners = (random_words(11, int(packs.max()) + 1) % np.uint64(num_nodes)).astype(np.int64)[packs]
    side_by_side = np.argsort(places, kind="stable")
    return np.concatenate(orders)[side_by_side], owners[side_by_side]


def _epoch(deal: SourceDeal, lane: int) -> list[int]:
    """The samples of a lane's first epoch, one for each unit."""
    samples, cursor = [], FIRST
    while (dealt := deal.next(lane, cursor, 1)) is not None:
        samples.append(dealt.unit.sample)
        cursor = dealt.cursor
    return samples


def global_reads(cluster: Cluster, corpus: Corpus) -> list[Int64Array]:
    """The samples of the first nodes where all units are shuffled together and dealt in turn."""
    samples = np.arange(len(corpus.tokens))
    units = np.repeat(samples, corpus.pieces(samples))
    shuffled = units[permutation(7, len(units))]
    return [shuffled[node :: cluster.num_nodes] for node in range(FOLLOWED_NODES)]


def simulate(cluster: Cluster, *, documents: bool = False) -> dict[str, float]:
    """Amplifications by what is done."""
    num_shards = cluster.lanes * cluster.shards_per_lane
    corpus = Corpus(num_shards, cluster.samples_per_shard, documents=documents)
    reads, shuffled = lane_reads(cluster, corpus), global_reads(cluster, corpus)
    return {
        "ranges": cluster.readers * ranges(corpus, reads),
        "shards": whole_shards(corpus, reads, cluster.cached_shards),
        "all samples shuffled": whole_shards(corpus, shuffled, cluster.cached_shards),
        "all samples shuffled, cache without bound": whole_shards(corpus, shuffled, num_shards),
    }


def variants(cluster: Cluster) -> dict[str, dict[str, float]]:
    """What makes whole shards dear, and what makes ranges so."""
    few = replace(cluster, shards_per_lane=1, samples_per_shard=8 * cluster.samples_per_shard)
    samples, documents = simulate(cluster), simulate(cluster, documents=True)
    return {
        IMAGES: samples,
        DOCUMENTS: documents,
        BOTH: mixed(samples, documents, text_ratio=0.7),
        "4 ranks of a node read each sample": simulate(replace(cluster, readers=4)),
        "the cache holds half of the windows": simulate(replace(cluster, cached_windows=0.5)),
        "a lane's packs run on 2 nodes": simulate(replace(cluster, nodes_per_group=2)),
        "a lane's packs run on 4 nodes": simulate(replace(cluster, nodes_per_group=4)),
        "as many shards as lanes, each cut in 4": simulate(few),
    }


def mixed(samples: dict[str, float], documents: dict[str, float], text_ratio: float) -> dict[str, float]:
    """Amplifications of a stage that has both, where `text_ratio` of the positions are those of documents."""
    weights = {
        kind: share * corpus.used_bytes.sum() / corpus.tokens.sum()
        for kind, share in (("samples", 1 - text_ratio), ("documents", text_ratio))
        for corpus in [Corpus(1, 1000, documents=kind == "documents")]
    }
    return {
        way: float(weights["samples"] * samples[way] + weights["documents"] * documents[way])
        / float(sum(weights.values()))
        for way in samples
    }


def main() -> None:
    results = {num_nodes: variants(Cluster(num_nodes=num_nodes)) for num_nodes in (64, 512)}
    columns = list(results[64][IMAGES])
    rows: list[list[str | float]] = [
        [f"{num_nodes} nodes: {name}", *(found[column] for column in columns)]
        for num_nodes, cases in results.items()
        for name, found in cases.items()
    ]
    print(table(["bytes fetched per byte used", *columns], rows), end="\n\n")
    goals = [
        Goal(
            name=f"{way}, {num_nodes} nodes: {case}",
            ours=cases[case][way],
            peer=cases[case]["all samples shuffled, cache without bound"],
            unit="bytes fetched per byte used",
            ratio=cases[case][way],
            bound="at most",
            goal=GOAL,
        )
        for num_nodes, cases in results.items()
        for way, case in RECOMMENDED
    ]
    print_goals("read_amplification", sorted(goals, key=lambda goal: -goal.ratio))


if __name__ == "__main__":
    run_benchmark(main)
