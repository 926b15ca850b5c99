"""Public benchmarks as they ship: readers of their files, graders of generated answers, and their metrics.

`catalog.BENCHMARKS` has them by name. The prompts are those of the public harnesses, which each reader names.
A benchmark over images asks in a conversation; one over text alone is a document that the answer continues.
Options carry no space in front: whoever scores them puts one between the prompt and the option.
"""
