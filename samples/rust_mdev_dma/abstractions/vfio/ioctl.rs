// SPDX-License-Identifier: GPL-2.0

//! Helpers for the ioctls of a device file.

use super::DeviceInfo;
use crate::bindings;
use kernel::{
    ioctl::_IO,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};

/// The number of a VFIO ioctl, from its offset to `VFIO_BASE`.
pub(super) const fn vfio_ioctl(nr: u32) -> u32 {
    // CAST: The type is a character.
    _IO(
        bindings::VFIO_TYPE as u32,
        bindings::VFIO_BASE.wrapping_add(nr),
    )
}

/// Reads `words.len()` words at `arg`. Fails with `EINVAL` if the first, `argsz`, is less than
/// their size.
pub(super) fn read_words(arg: usize, words: &mut [u32]) -> Result {
    let mut reader = UserSlice::new(UserPtr::from_addr(arg), size_of_val(words)).reader();
    for word in words.iter_mut() {
        *word = reader.read()?;
    }
    match words.first() {
        Some(&argsz) if argsz as usize >= size_of_val(words) => Ok(()),
        _ => Err(EINVAL),
    }
}

/// Writes `words` at `arg`.
pub(super) fn write_words(arg: usize, words: &[u32]) -> Result {
    let mut writer = UserSlice::new(UserPtr::from_addr(arg), size_of_val(words)).writer();
    for word in words {
        writer.write(word)?;
    }
    Ok(())
}

/// `VFIO_DEVICE_GET_INFO`: `struct vfio_device_info`, up to `num_irqs`.
pub(super) fn get_info(arg: usize, info: &DeviceInfo, num_irqs: u32) -> Result {
    let mut words = [0; 4];
    read_words(arg, &mut words)?;
    let [argsz, ..] = words;
    write_words(arg, &[argsz, info.flags, info.num_regions, num_irqs])
}
