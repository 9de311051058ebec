"""How a method meets a batch: objectives, augmentation, schedules, optimisers."""
