"""Problems, and the settings of a training recipe."""
