"""Where every pixel comes from: shares of training images, copies among pictures."""
