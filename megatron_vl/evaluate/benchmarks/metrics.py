"""From the scores of a benchmark's items to its metrics. All are shares, except for OCRBench's sum."""

from collections.abc import Sequence
from statistics import fmean

from megatron_vl.evaluate.items import Item

CIRCULAR_OFFSET = 1_000_000  # MMBench: from a question's index to those of its copies with rotated options

Scores = Sequence[float]


def accuracy(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    """The mean score, overall and as accuracy/CATEGORY. Raises ValueError where there are no items."""
    groups = _by_category(items, scores)
    return {"accuracy": fmean(scores)} | {f"accuracy/{name}": fmean(group) for name, group in groups.items()}


def circular_accuracy(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    """MMBench's: accuracy, and circular_accuracy, where a question counts if all its rotated copies are right.

    Without copies in the file the two are equal.
    """
    questions: dict[int, float] = {}
    for item, score in zip(items, scores, strict=True):
        index = int(item.key) % CIRCULAR_OFFSET
        questions[index] = min(questions.get(index, 1.0), score)
    return {"circular_accuracy": fmean(questions.values())} | accuracy(items, scores)


def total_score(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    """OCRBench's: how many items are right (of 1000), overall and as score/CATEGORY."""
    groups = _by_category(items, scores)
    return {"score": sum(scores)} | {f"score/{name}": sum(group) for name, group in groups.items()}


def yes_no(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    """POPE's: accuracy, precision, recall and F1 of "yes", and how often it is said; also by category.

    An item's option 0 is yes; what the model said follows from the score. What has no value, such as the
    precision of a model that never says yes, is 0.
    """
    metrics = _yes_no(items, scores)
    categories = dict.fromkeys(item.category for item in items)
    for category in categories:
        chosen = [pair for pair in zip(items, scores, strict=True) if pair[0].category == category]
        of_category = _yes_no([item for item, _ in chosen], [score for _, score in chosen])
        metrics |= {f"{name}/{category}": value for name, value in of_category.items()}
    return metrics


def _yes_no(items: Sequence[Item], scores: Scores) -> dict[str, float]:
    answers = [item.correct == 0 for item in items]
    said = [answer == (score == 1.0) for answer, score in zip(answers, scores, strict=True)]
    both = sum(answer and yes for answer, yes in zip(answers, said, strict=True))
    precision = both / sum(said) if any(said) else 0.0
    recall = both / sum(answers) if any(answers) else 0.0
    return {
        "accuracy": fmean(scores),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes_ratio": fmean(said),
    }


def _by_category(items: Sequence[Item], scores: Scores) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        if item.category:
            groups.setdefault(item.category, []).append(score)
    return groups
