"""The training loop: one for every family and every target.

Shape letters: B samples, C channels, H W latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from library.data.batch import Batch
from library.diffusion.loss import diffusion_loss, training_target
from library.diffusion.noise import complete_noise, noised_latents
from library.models import vae
from library.randomness import seed_global_generators
from library.train.guard import TrainingDiverged
from library.train.logs import StepRecord
from library.train.placement import reduced, to_device
from library.train.run import Run


def train(run: Run) -> int:
    """Train from the run's start step to its end; returns the exit code (0, or 128 + signal when asked to stop).

    Whatever ends it early, the work up to the last finished step is saved.
    """
    with run.stop.listening():
        try:
            run.before_first_step()
            while not (run.is_complete or run.stop_requested()):
                train_one_step(run)
        except Exception:
            run.rescue()
            raise
        finally:
            run.batches.close()  # ends the data workers; they don't listen to signals
        return run.finish()


def train_one_step(run: Run) -> None:
    """One optimizer update and what is due after it."""
    epoch = run.plan.epoch_of(run.step + 1)
    if run.plan.position_after(run.step).batch_index == 0 or run.step == run.start_step:
        run.log.begin_epoch(epoch)
        run.target.on_epoch_start(epoch)
    record = update(run, run.batches, run.step)
    run.step += 1
    run.log.push(replace(record, step=run.step, epoch=epoch))
    if run.guard.gives_up:
        raise TrainingDiverged(run.guard.in_a_row, run.save_last_good(), run.step)
    run.last_good.consider(run.step)
    run.after_step(run.step)
    if run.plan.ends_epoch(run.step):
        run.log.end_epoch(epoch, run.step)
        run.after_epoch(epoch, run.step)


def update(run: Run, batches: Iterator[Batch], step: int) -> StepRecord:
    """One optimizer update: the gradients' mean over the update's batches, clipped, applied if finite."""
    run.target.on_step_start(step)
    num_batches = run.plan.batches_of(step + 1)
    losses, names = [], []
    for index in range(num_batches):
        batch = to_device(next(batches), run.device)
        seed_global_generators(run.seed, "step", step, index, run.accelerator.process_index)
        with run.updates.micro_batch(run.model, is_last=index == num_batches - 1):
            loss = batch_loss(run, batch, trains_text=run.target.trains_text(step))
            run.accelerator.backward(loss / num_batches)
        losses.append(loss.detach())
        names.extend(batch.image_names)
    loss = reduced(run.accelerator, torch.stack(losses).mean(), "mean")
    grad_norm = run.updates.clip()
    is_finite = torch.isfinite(loss) & (torch.isfinite(grad_norm) | run.has_gradient_scaler)
    run.updates.apply(is_finite)
    learning_rates = run.learning_rates()
    if run.lr_scheduler is not None and not run.accelerator.optimizer_step_was_skipped:
        run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    extra = run.target.after_optimizer_step()
    return StepRecord(step, 0, loss, grad_norm, is_finite, learning_rates, tuple(names), extra)


def batch_loss(run: Run, batch: Batch, *, trains_text: bool) -> torch.Tensor:
    """The loss of one batch on this process, a float32 scalar with gradients."""
    latents_BCHW = latents_of(run, batch)
    batch = complete_noise(batch, latents_BCHW, run.config.noise)
    noised_BCHW = noised_latents(latents_BCHW, batch, run.schedule)
    prediction_BCHW = run.model(noised_BCHW.to(run.unet_dtype), batch, trains_text)
    target_BCHW = training_target(latents_BCHW, batch, run.schedule, v_prediction=run.v_prediction)
    return diffusion_loss(
        prediction_BCHW, target_BCHW, batch, run.schedule, run.config.loss, v_prediction=run.v_prediction
    )


@torch.no_grad()
def latents_of(run: Run, batch: Batch) -> torch.Tensor:
    """Scaled latents (B, C, H, W) in float32: from the cache, or sampled from the VAE."""
    latents_BCHW = batch.latents_BCHW
    if latents_BCHW is None:
        assert batch.images_BCHW is not None and batch.posterior_noise_BCHW is not None
        latents_BCHW = vae.encode(run.bundle.vae, batch.images_BCHW, batch.posterior_noise_BCHW)
    return latents_BCHW.float() * run.family.latent_scale
