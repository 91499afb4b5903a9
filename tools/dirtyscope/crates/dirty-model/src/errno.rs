// SPDX-License-Identifier: GPL-2.0-only

use std::fmt;

/// An error number, as `errno.h` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident $number:literal $what:literal)*) => {
        impl Errno {
            $(#[doc = $what] pub const $name: Self = Self($number);)*

            /// Its name, if it is one of those above.
            fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM 1 "Operation not permitted"
    ENOENT 2 "No such file or directory"
    EINTR 4 "Interrupted system call"
    ENXIO 6 "No such device or address"
    E2BIG 7 "Argument list too long"
    EAGAIN 11 "Resource temporarily unavailable"
    ENOMEM 12 "Cannot allocate memory"
    EACCES 13 "Permission denied"
    EFAULT 14 "Bad address"
    EBUSY 16 "Device or resource busy"
    EEXIST 17 "File exists"
    ENODEV 19 "No such device"
    EINVAL 22 "Invalid argument"
    ENOTTY 25 "Inappropriate ioctl for device"
    ENOSPC 28 "No space left on device"
    EOVERFLOW 75 "Value too large for defined data type"
    EUSERS 87 "Too many users"
    EOPNOTSUPP 95 "Operation not supported"
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}
