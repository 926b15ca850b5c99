"""The vision-language model: vision towers, adaptor, stage zero, decoder, and this rank's part of it."""
