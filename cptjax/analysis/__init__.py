"""Why something was forgotten: the measurements behind the papers' explanations, on finished runs. `launch/analyze.py` names them.

mixture     which divergence forgets, on Gaussians (Retaining by Doing)
drift       loss on what is not trained, against the distance from the base (RL's Razor)
influence   what learning one answer does to others, by the corpus it is from (why RFT preserves prior knowledge)
fisher      what SFT's and RFT's gradients risk on the same prompts (RFT naturally mitigates forgetting)
"""
