"""Plans DeepSeek-V2-Lite on hardware described in a TOML file, with rules about what goes where. Nothing is loaded.

python examples/plan_hardware_you_do_not_have.py
"""

from pathlib import Path

import ciuic_runtime as ciuic

hw = ciuic.DeviceManager.from_toml(Path(__file__).with_name("two_gpus.toml"))
model = ciuic.Model("deepseek-v2-lite")
placement = (
    ciuic.Placement()  # rules in order, a later one overrides
    .put("layers.*.experts.*", on=["cuda:0", "cuda:1", "cpu"])
    .put("layers.20-26.*", on="cpu")
)
schedule = ciuic.plan(model, hw, workload=ciuic.Workload(prompt_tokens=512, max_tokens=128), placement=placement)
print(schedule)
print(schedule.explain("layers.25.experts.17"))
