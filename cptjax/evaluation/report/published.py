"""Figures that others published, for reference only: nothing here was reproduced, and no number of a run is compared by code.

Grades: P = read in the authors' own abstract or code; S = copied from someone who says they read the paper (S2, S3: two or
three such sources agree, possibly from one ancestor); I = our inference. An empty figure was not reachable.
"""

SOURCE = "arXiv 2507.05386, Qwen2.5-VL-7B, seven VQA tasks; percent and points"
GRADES = {
    "P": "authors' own abstract or code",
    "S": "second-hand, numbers copied from notes on the paper",
    "I": "our inference",
}
METHODS = (  # method, AvgAcc, FM, MMMU, MMLU-Pro, POPE; each (figure, grade)
    ("base model", None, None, (52.1, "S3"), (47.5, "S"), (86.6, "I")),
    ("SFT", (54.0, "S2"), (-10.4, "S3"), (40.1, "S2"), (30.6, "S"), None),
    ("ReMax", None, (-3.8, "S"), None, None, None),
    ("RLOO", None, (-2.1, "S"), None, None, None),
    ("GRPO", (60.0, "S2"), (-2.3, "S3"), (54.2, "S3"), None, (88.5, "S")),
    ("GRPO without KL", (59.5, "S"), None, None, None, None),
    ("GRPO without CoT", (59.4, "S"), None, None, None, None),
    ("RIF-RFT", (57.5, "S"), (-4.5, "S"), None, None, None),
    ("joint (multi-task)", (62.9, "S2"), None, None, None, None),
)
HEADER = ("method", "AvgAcc", "FM", "MMMU", "MMLU-Pro", "POPE")
