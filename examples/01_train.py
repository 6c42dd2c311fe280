"""Tune two concepts, each on eight photos of its own: `python examples/01_train.py`.

On the base that ships in the package, without a GPU, in some minutes. It leaves `photos/NAME` and `concepts/NAME`,
which 02_fuse.py goes on from. For photographs: put yours into a folder, with captions and masks if you have any, and
take Stable Diffusion's settings:

    TrainingConfig(instance_data_dir="photos/potter", concept="potter", class_word="man", output_dir="concepts/potter")
"""

from pathlib import Path

from diffusers_mixofshow import EDLoRATrainer, TrainingConfig, toyland


for name in ("rex", "ming"):
    known = toyland.CONCEPTS[name]  # a spotted dog, and a striped vase
    photos = toyland.write_photos(known, Path("photos", name), count=8)
    config = TrainingConfig.toyland(
        instance_data_dir=photos,
        concept=name,  # prompts will say <rex>
        class_word=known.class_word,
        kind=known.kind,
        output_dir=Path("concepts", name),
        overwrite=True,  # what an earlier run has left
    )
    edlora = EDLoRATrainer(config).train()
    print(f"<{name}> is in {config.output_dir}: {len(edlora.lora)} layers of rank {config.rank}")
