"""What several formats share: quantised layers, number types and the assembly of a model from stored tensors."""
