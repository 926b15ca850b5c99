"""The evaluation hook of training: held-out losses, and whether the image is used."""

import json

from megatron_vl.evaluate.heldout import Scorer
from megatron_vl.evaluate.rows import RowScorer
from megatron_vl.evaluate.samples import heldout_samples
from megatron_vl.train.metrics import HeldoutLoss, ImageUse
from megatron_vl.train.run_dir import RunDirectory, write_atomically
from megatron_vl.train.sources import Sources
from megatron_vl.train.stage import Stage


def evaluate_heldout(
    sources: Sources,
    max_samples: int,
    directory: RunDirectory | None,
    stage: Stage,
    step: int,
    global_step: int,
    ends: bool,
) -> list[HeldoutLoss | ImageUse]:
    """Score the held-out part of every source that the stage trains on; at its end, with swapped images too.

    `directory` is where a few of the samples go, on the rank that writes. Collective over the world.
    """
    rows = RowScorer(
        chunks=stage.model.chunks,
        groups=stage.model.groups,
        content=sources.content,
        sequence_length=stage.settings.values.sequence_length,
    )
    scorer = Scorer(rows=rows, max_samples=max_samples)
    name, results = stage.settings.name, list[HeldoutLoss | ImageUse]()
    used = [source for source in stage.settings.values.sources if source in sources.heldout]
    for source in used if max_samples else []:
        index = sources.heldout[source]
        scores = scorer.score(index)
        count = len(scores.sample_losses)
        results.append(
            HeldoutLoss(
                stage=name,
                step=step,
                global_step=global_step,
                source=source,
                loss=scores.loss,
                num_samples=count,
            )
        )
        if ends and sources.modality[source] == "multimodal":
            use = scorer.image_use(index, scores)
            results.append(ImageUse(stage=name, global_step=global_step, source=source, **vars(use)))
    if ends and directory is not None:
        images = [sources.heldout[source] for source in used if sources.modality[source] == "multimodal"]
        write_atomically(directory.samples, json.dumps(heldout_samples(images, sources.content)))
    return results
