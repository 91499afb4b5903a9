// SPDX-License-Identifier: GPL-2.0-only

use std::{fmt, ops::BitOr};

/// An error number, as `errno.h` has it.
///
/// The names are those that calls and commands are expected to answer, or that were seen; any other
/// number keeps its value. Crates that have all names, such as `nix`, lose the number of an errno that
/// is none of userspace's, which is what a defect of the kernel may answer.
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
    EFBIG 27 "File too large"
    ENOSPC 28 "No space left on device"
    ENOMSG 42 "No message of desired type"
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

/// One of several errnos: what a call may fail with if more than one thing is wrong with it, and the
/// contract doesn't say which is looked at first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Errnos(u128);

impl Errnos {
    /// Nothing is wrong.
    pub(crate) const NONE: Self = Self(0);

    /// This errno, if something is wrong.
    pub(crate) fn when(wrong: bool, errno: Errno) -> Self {
        if wrong { errno.into() } else { Self::NONE }
    }

    /// Fails if anything is wrong.
    pub(crate) fn check(self) -> Result<(), Self> {
        if self == Self::NONE { Ok(()) } else { Err(self) }
    }

    /// Whether `errno` is one of them.
    pub fn contains(self, errno: Errno) -> bool {
        bit(errno).is_some_and(|bit| self.0 & bit != 0)
    }
}

/// Bit n stands for errno n.
fn bit(errno: Errno) -> Option<u128> {
    1u128.checked_shl(u32::try_from(errno.0).ok()?)
}

impl From<Errno> for Errnos {
    /// Panics if no call of the contract can fail with `errno`.
    fn from(errno: Errno) -> Self {
        Self(bit(errno).expect("an errno of the contract"))
    }
}

impl<T: Into<Errnos>> BitOr<T> for Errnos {
    type Output = Self;

    fn bitor(self, other: T) -> Self {
        Self(self.0 | other.into().0)
    }
}

impl BitOr for Errno {
    type Output = Errnos;

    fn bitor(self, other: Self) -> Errnos {
        Errnos::from(self) | other
    }
}

impl fmt::Display for Errnos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errnos = (0..u128::BITS as i32).map(Errno).filter(|&errno| self.contains(errno));
        for (i, errno) in errnos.enumerate() {
            write!(f, "{}{errno}", if i == 0 { "" } else { " or " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Errnos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several() {
        let one = Errnos::from(Errno::EINVAL);
        let two = one | Errno::EOVERFLOW | Errno::EINVAL;
        assert_eq!(two, Errno::EOVERFLOW | Errno::EINVAL);
        assert_eq!(
            (one.to_string(), two.to_string()),
            ("EINVAL".into(), "EINVAL or EOVERFLOW".into())
        );
        assert_eq!(format!("{two:?} {}", Errno(524)), "EINVAL or EOVERFLOW errno 524");
        assert!(two.contains(Errno::EOVERFLOW) && !one.contains(Errno::EOVERFLOW));
        for strange in [Errno::EFAULT, Errno(0), Errno(-22), Errno(524), Errno(22 + 128)] {
            assert!(!two.contains(strange), "{strange}");
        }
    }
}
