//! placeholder
mod convert;
mod error;
