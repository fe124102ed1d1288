"""Trains the bundled model from nothing: `allegro-tiny`, the same family as the released ones, but a thousand times smaller.

    python -m allegro_model.training --out DIR

makes the model folder DIR (tokenizer, text encoder, transformer, vae), beside it DIR-ti2v (the image-to-video transformer,
which shares everything else with DIR) and DIR-vfi (the frame interpolator, which needs nothing of the others) in about
three and a half hours on two CPU cores. Every stage is seeded and resumable: run the same command again after an
interruption. Needs `pip install "allegro-video[standalone]"`.

Stages:
  tokenizer  a hand-made word vocabulary in T5 format
  vae        the VideoVAE, encoder and decoder, on crops of procedural clips (16 frames of 32 x 32 pixels)
  latents    every training clip encoded once
  dit        diffusion transformer and T5 encoder together, captions worded anew at every step
  decoder    the VAE's decoder alone, on whole clips
  ti2v_latents  image-to-video clips encoded once, and what is given of each: its first frame, first and last, others
  ti2v       the transformer goes on with given frames as a second input
  export     half-precision weights in the published folder layout
  evaluate   prompts that training never saw, sampled, decoded and read by image analysis; given frames, compared
  vfi        the frame interpolator, written and measured: pairs of moments of the clips and of moving layers, and any
             moment between

Image to video learns the official mixture (first frame 0.5, first and last 0.4, continuation 0.1) with two additions that
the released model was not shown and the nodes offer: 0.42 first frame, 0.33 first and last, 0.10 continuation, 0.10 last
frame or frames, 0.05 frames anywhere (`ti2v_stage`, `ti2v_cache`). Captions partly name the motion alone, and clips mostly
begin in mid-motion, so that colours and shape must come from the picture and the way to go from the caption.

    python -m allegro_model.training.lora --out FILE

trains a LoRA for a finished model; `lora` says how.

What made it work is in the code where it happens: `initialise` (networks that start as pass-throughs), `vfi_initialise`
(flow heads that start as a comparison of pictures), `losses` (noise prediction weighted by 1 / alpha-bar, extra weight on
objects and given frames), `recipe` (every number), `palette` (which combinations are held out). The losses, the loop,
data-parallel workers and the moving average do not depend on the size and serve the released models as well.
"""
