"""Splits a model's layers over two devices by hand, saves the schedule, and runs exactly that.

    python examples/split_layers.py MODEL [FIRST_LAYERS]

Where there is no second device, a simulated one stands in: its memory is separate, its speed is declared.
"""

import sys

import ciuic_runtime as ciuic


def main(path: str, first_layers: int | None = None) -> None:
    hw = ciuic.DeviceManager()
    model = ciuic.Model(path)
    cpu = hw.get_devices("CPU")[0]
    second = (hw.get_devices("GPU") or [simulated()])[0]
    split = first_layers if first_layers is not None else len(model.layers) // 2

    scheduler = ciuic.TaskScheduler(workload=ciuic.Workload(prompt_tokens=16, max_tokens=24))
    for layer in model.layers[:split]:
        scheduler.add_task(layer, cpu)
    for layer in model.layers[split:]:
        scheduler.add_task(layer, second)
    schedule = scheduler.schedule()
    print(schedule)

    with ciuic.LLM(path, schedule=schedule) as llm:
        [out] = llm.generate("The capital of France is", ciuic.SamplingParams(max_tokens=24))
        print(out.text)
        print(llm.trace.against(schedule))


def simulated() -> ciuic.DeviceSpec:
    return ciuic.DeviceSpec(
        name="sim:0",
        kind="SIM",
        memory_bytes=8 << 30,
        memory_bandwidth=400e9,
        matrix_rates={"bfloat16": 50e12, "float32": 25e12},
        basis="estimated",
    )


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(f"usage: {sys.argv[0]} MODEL [FIRST_LAYERS]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
