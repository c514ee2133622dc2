"""Whether a network takes the images of a data set: tried on one image, before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from composer_se.errors import UserError
from composer_se.recipe.messages import one_line

__all__ = ["check_network_takes"]


def check_network_takes(network: nn.Module, image: Tensor, name: str) -> None:
    """Runs one image through the network in evaluation mode, and leaves the network as it was.

    Args:
        network: On the image's device.
        image: As the training data yields it, (C, H, W).
        name: The network's name in the recipe.

    Raises:
        UserError: The network can't be run on the image.
    """
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(image[None])
    except (RuntimeError, ValueError, AssertionError) as error:
        channels, height, width = image.shape
        raise UserError(
            f"model: {name} does not take the images of train_dataset, of {channels} channels and {height}x{width} "
            f"pixels ({one_line(error)}); choose a model for such images, or set its input arguments"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
