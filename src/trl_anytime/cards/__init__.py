"""The model card of a trained model, written beside every model that is saved or pushed."""
