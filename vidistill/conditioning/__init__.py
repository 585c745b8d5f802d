"""What a network is told beside noise, from what people type, press and say."""
