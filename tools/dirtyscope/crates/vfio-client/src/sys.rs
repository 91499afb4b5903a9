// SPDX-License-Identifier: GPL-2.0-only

//! The calls that the compiler can't check.

use crate::{coverage, fail_nth::counted};
use iommufd_bindings::IOMMUFD_TYPE;
use rustix::{
    io::{Errno, Result},
    ioctl::{Ioctl, IoctlOutput, Opcode, opcode},
    process::Pid,
};
use std::{
    ffi::{CStr, c_void},
    fs::File,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};

pub(crate) const GET_API_VERSION: Opcode = vfio(0);
pub(crate) const CHECK_EXTENSION: Opcode = vfio(1);
pub(crate) const SET_IOMMU: Opcode = vfio(2);
pub(crate) const GROUP_GET_STATUS: Opcode = vfio(3);
pub(crate) const GROUP_SET_CONTAINER: Opcode = vfio(4);
pub(crate) const GROUP_UNSET_CONTAINER: Opcode = vfio(5);
pub(crate) const GROUP_GET_DEVICE_FD: Opcode = vfio(6);
pub(crate) const DEVICE_GET_INFO: Opcode = vfio(7);
pub(crate) const DEVICE_GET_REGION_INFO: Opcode = vfio(8);
pub(crate) const DEVICE_GET_IRQ_INFO: Opcode = vfio(9);
pub(crate) const DEVICE_SET_IRQS: Opcode = vfio(10);
pub(crate) const DEVICE_RESET: Opcode = vfio(11);
pub(crate) const IOMMU_GET_INFO: Opcode = vfio(12);
pub(crate) const IOMMU_MAP_DMA: Opcode = vfio(13);
pub(crate) const IOMMU_UNMAP_DMA: Opcode = vfio(14);
pub(crate) const IOMMU_DIRTY_PAGES: Opcode = vfio(17);
pub(crate) const DEVICE_FEATURE: Opcode = vfio(17);
pub(crate) const DEVICE_BIND_IOMMUFD: Opcode = vfio(18);
pub(crate) const DEVICE_ATTACH_IOMMUFD_PT: Opcode = vfio(19);
pub(crate) const MIG_GET_PRECOPY_INFO: Opcode = vfio(21);

/// The number of the ioctl that comes `nr` after `VFIO_BASE`.
pub(crate) const fn vfio(nr: u32) -> Opcode {
    opcode::none(VFIO_TYPE, (VFIO_BASE + nr) as u8)
}

/// The number of an iommufd's ioctl, from its `IOMMUFD_CMD_*`.
pub(crate) const fn iommufd(command: u32) -> Opcode {
    opcode::none(IOMMUFD_TYPE, command as u8)
}

/// An ioctl whose argument is `arg`, a number or an address, and whose result is the number that it
/// returns.
struct Call {
    request: Opcode,
    arg: *mut c_void,
}

// SAFETY: `opcode` and `as_ptr` give what the call was made with, whose validity is promised by the
// callers of `ioctl` and `ioctl_value`, the only ones who make it. It may write through `arg`, so
// `IS_MUTATING` is set. The output is the returned number, no pointer is looked at.
unsafe impl Ioctl for Call {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.request
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.arg
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _arg: *mut c_void) -> Result<i32> {
        Ok(out)
    }
}

/// Makes a system call whose allocations count, and whose coverage is taken note of, if either is wanted.
pub(crate) fn call<T>(call: impl FnOnce() -> T) -> T {
    coverage::call(|| counted(call))
}

/// Makes the ioctl `request` with the address of `arg`, which is to return 0. Fails with `EPROTO` if it returns another
/// number that is no error.
///
/// # Safety
///
/// The kernel reads and writes no more than `*arg` and what pointers in it point to; these are valid
/// for as long as the kernel uses them, which may be longer than this call.
pub(crate) unsafe fn ioctl<T>(fd: impl AsFd, request: Opcode, arg: &mut T) -> Result<()> {
    let arg = std::ptr::from_mut(arg).cast();
    // SAFETY: As the caller promises.
    match call(|| unsafe { raw_ioctl(fd, request, arg) })? {
        0 => Ok(()),
        _ => Err(Errno::PROTO),
    }
}

/// Makes the ioctl `request`, of which coverage takes no note.
///
/// # Safety
///
/// As for [`ioctl`], if `arg` is an address; else as for [`ioctl_value`].
pub(crate) unsafe fn raw_ioctl(fd: impl AsFd, request: Opcode, arg: *mut c_void) -> Result<i32> {
    // SAFETY: As the caller promises.
    unsafe { rustix::ioctl::ioctl(fd, Call { request, arg }) }
}

/// Makes the ioctl `request` with a number.
///
/// # Safety
///
/// The kernel doesn't take the number for an address; unless it is 0, where no user memory is.
pub(crate) unsafe fn ioctl_value(fd: impl AsFd, request: Opcode, value: usize) -> Result<i32> {
    let arg = std::ptr::without_provenance_mut(value);
    // SAFETY: As the caller promises.
    call(|| unsafe { raw_ioctl(fd, request, arg) })
}

/// `VFIO_GROUP_GET_DEVICE_FD`
pub(crate) fn open_device(group: BorrowedFd<'_>, name: &CStr) -> Result<File> {
    let name = name.as_ptr().cast_mut().cast();
    // SAFETY: The kernel reads a string that ends with a zero byte, and writes nothing.
    let fd = call(|| unsafe { raw_ioctl(group, GROUP_GET_DEVICE_FD, name) })?;
    // SAFETY: The kernel just opened this file descriptor for us, nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Whether this process is a child of [`fork`].
pub(crate) static FORKED: AtomicBool = AtomicBool::new(false);

/// `fork()`. The child does what it is told, and ends; it ends with its parent, too.
///
/// # Safety
///
/// `child` only makes system calls, which neither allocate nor return to where the parent is: it may
/// have been forked while other threads held locks.
pub(crate) unsafe fn fork(child: impl FnOnce()) -> Result<Pid> {
    // SAFETY: It takes no arguments.
    let parent = unsafe { libc::getpid() };
    // SAFETY: The child does as the caller promises, and then ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        FORKED.store(true, Relaxed);
        // SAFETY: The arguments are numbers, and there is nothing that this could take away.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        // SAFETY: It takes no arguments.
        if unsafe { libc::getppid() } == parent {
            // Had the parent ended before that, nothing would end us.
            child();
        }
        // SAFETY: It takes a number, and doesn't return.
        unsafe { libc::_exit(0) };
    }
    // No process has a negative number: that is how `fork()` fails.
    Pid::from_raw(pid.max(0)).ok_or(Errno::AGAIN)
}

/// `fork()`. The child does nothing until it is killed, or its parent ends.
pub(crate) fn fork_and_pause() -> Result<Pid> {
    let pause = || {
        loop {
            // SAFETY: It takes no arguments.
            unsafe { libc::pause() };
        }
    };
    // SAFETY: It makes this one system call.
    unsafe { fork(pause) }
}

/// Becomes a shell that reads commands from `commands`, writes answers to `answers`, and keeps `kept`
/// as file descriptors 3, 4 and so on. Returns only if that fails. Only makes system calls. All other
/// files whose numbers these are get closed, so this is for a child of [`fork`] alone.
///
/// # Safety
///
/// Nobody uses a file descriptor of this process any more.
pub(crate) unsafe fn become_shell(commands: i32, answers: i32, kept: &mut [i32]) {
    // Out of the way of those that they will be.
    const FAR: i32 = 100;
    let moved = |fd: i32| {
        // SAFETY: The arguments are numbers.
        unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, FAR) }
    };
    let (commands, answers) = (moved(commands), moved(answers));
    for fd in &mut *kept {
        *fd = moved(*fd);
    }
    for (fd, at) in [commands, answers].into_iter().chain([2]).chain(kept.iter().copied()).zip(0..)
    {
        if fd != at {
            // SAFETY: The arguments are numbers; what was open there is closed, which as the caller
            // promises nobody uses.
            unsafe { libc::dup2(fd, at) };
        }
    }
    const SCRIPT: &CStr = c"while read -r line; do eval \"$line\"; done";
    let argv = [c"sh".as_ptr(), c"-c".as_ptr(), SCRIPT.as_ptr(), std::ptr::null()];
    let envp = [c"PATH=/bin:/usr/bin".as_ptr(), std::ptr::null()];
    // SAFETY: These are strings that end with a zero byte, in arrays that end with a null pointer.
    unsafe { libc::execve(c"/bin/sh".as_ptr(), argv.as_ptr(), envp.as_ptr()) };
}

/// The signal of [`send_signal`].
const SIGNAL: i32 = libc::SIGUSR2;

/// Has [`SIGNAL`] do nothing, but interrupt system calls.
pub(crate) fn handle_signal() -> Result<()> {
    extern "C" fn handler(_signal: i32) {}
    let handler = handler as extern "C" fn(i32) as libc::sighandler_t;
    // SAFETY: All zero, an action is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    // SAFETY: The action is valid, and the handler may be called at any time.
    match unsafe { libc::sigaction(SIGNAL, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(Errno::INVAL),
    }
}

/// Sends [`SIGNAL`] to a thread of this process, if it exists.
pub(crate) fn send_signal(thread: Pid) {
    let (process, thread) = (rustix::process::getpid(), thread.as_raw_nonzero().get());
    // SAFETY: The arguments are numbers.
    unsafe { libc::syscall(libc::SYS_tgkill, process.as_raw_nonzero().get(), thread, SIGNAL) };
}

/// Reads `len` bytes of a file to an address, or writes them.
///
/// # Safety
///
/// The kernel may read and write so many bytes there.
pub(crate) unsafe fn transfer(
    file: impl AsFd,
    address: u64,
    len: usize,
    read: bool,
) -> Result<usize> {
    use std::os::fd::AsRawFd;
    let (fd, number) =
        (file.as_fd().as_raw_fd(), if read { libc::SYS_read } else { libc::SYS_write });
    // SAFETY: As the caller promises.
    let done = unsafe { libc::syscall(number, fd, address, len) };
    usize::try_from(done).map_err(|_| {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Errno::from_raw_os_error(errno)
    })
}
