"""The stages of a job, a file each: what one computes, from the network before it to the network after it."""
