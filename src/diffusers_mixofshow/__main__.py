"""``python -m diffusers_mixofshow``, which launchers such as ``accelerate launch -m`` need."""

from diffusers_mixofshow.cli import main


if __name__ == "__main__":
    main()
