//! Messages of the `control` data channel (stream-protocol sections 5 to 9).
