"""What lies between files and networks: prompts to text, pixels to latents and back, videos and pictures."""
