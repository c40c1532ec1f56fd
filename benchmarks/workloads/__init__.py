"""What is computed: models, data, losses and hyperparameters, without any library of the field."""
