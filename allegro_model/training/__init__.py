"""Trains the bundled model from nothing: `allegro-tiny`, the same family as the released ones, but a thousand times smaller.

    python -m allegro_model.training --out DIR

makes the model folder DIR (tokenizer, text encoder, transformer, vae) in about two hours on two CPU cores. Every stage is
seeded and resumable: run the same command again after an interruption. Needs `pip install "allegro-video[standalone]"`.

Stages:
  tokenizer  a hand-made word vocabulary in T5 format
  vae        the VideoVAE, encoder and decoder, on crops of procedural clips (16 frames of 32 x 32 pixels)
  latents    every training clip encoded once
  dit        diffusion transformer and T5 encoder together, captions worded anew at every step
  decoder    the VAE's decoder alone, on whole clips
  export     half-precision weights in the published folder layout
  evaluate   prompts that training never saw, sampled, decoded and read by image analysis

What made it work is in the code where it happens: `initialise` (networks that start as pass-throughs), `losses`
(noise prediction weighted by 1 / alpha-bar, extra weight on objects), `recipe` (every number), `palette` (which
combinations are held out). The losses, the loop, data-parallel workers and the moving average do not depend on the size
and serve the released models as well.
"""
