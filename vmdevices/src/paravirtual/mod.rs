//! Small devices that hypervisors give their guests, and no PC ever had.

mod generation;
mod panic;

pub use generation::{Generation, GenerationHandle};
pub use panic::{GuestEvent, Pvpanic};
