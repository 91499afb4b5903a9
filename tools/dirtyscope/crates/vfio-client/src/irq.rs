// SPDX-License-Identifier: GPL-2.0-only

use crate::{Device, Error, Result, sys};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};
use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
};

/// An eventfd, to be signalled by the kernel, or to signal it.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// One that wasn't signalled yet.
    pub fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self(fd.map_err(|e| Error::new("eventfd", e))?))
    }

    /// Signals it.
    pub fn signal(&self) -> Result<()> {
        let written = sys::call(|| rustix::io::write(&self.0, &1u64.to_ne_bytes()));
        written.map(drop).map_err(|e| Error::new("write to an eventfd", e))
    }

    /// How often it was signalled since the last call.
    pub fn take(&self) -> Result<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(e) => Err(Error::new("read of an eventfd", e)),
        }
    }

    /// Waits until it is signalled, then does what [`Self::take`] does; 0 if that takes too long.
    pub fn wait(&self, timeout: Duration) -> Result<u64> {
        let timeout = Timespec::try_from(timeout)
            .map_err(|_| Error::other(format!("{timeout:?} is too long to wait")))?;
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).map_err(|e| Error::new("poll of an eventfd", e))?;
        self.take()
    }
}

impl From<EventFd> for OwnedFd {
    fn from(eventfd: EventFd) -> Self {
        eventfd.0
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What comes with a [`SetIrqs`].
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// Nothing.
    None,
    /// A yes or no for each interrupt.
    Bool(&'a [bool]),
    /// An eventfd for each interrupt, or none.
    EventFd(&'a [Option<BorrowedFd<'a>>]),
}

/// The arguments of `VFIO_DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug)]
pub struct SetIrqs<'a> {
    /// Which index.
    pub index: u32,
    /// `VFIO_IRQ_SET_ACTION_*`. The flag of the data is added.
    pub action: u32,
    /// The first interrupt.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// Data, for `count` interrupts in well-formed calls.
    pub data: IrqData<'a>,
    /// `None` for what the data needs.
    pub argsz: Option<u32>,
}

impl Device {
    /// `VFIO_DEVICE_SET_IRQS`: has the first interrupt of an index signal an eventfd.
    pub fn set_trigger(&self, index: u32, eventfd: &EventFd) -> Result<()> {
        self.set_irqs(&SetIrqs {
            index,
            action: VFIO_IRQ_SET_ACTION_TRIGGER,
            start: 0,
            count: 1,
            data: IrqData::EventFd(&[Some(eventfd.as_fd())]),
            argsz: None,
        })
    }

    /// `VFIO_DEVICE_SET_IRQS`. Panics if there is data for more than 1024 interrupts.
    pub fn set_irqs(&self, args: &SetIrqs<'_>) -> Result<()> {
        let mut arg = Argument { head: [0; 5], data: [0; ROOM] };
        let (data_flag, size) = match args.data {
            IrqData::None => (VFIO_IRQ_SET_DATA_NONE, 0),
            IrqData::Bool(bools) => {
                for (word, bools) in arg.data.iter_mut().zip(bools.chunks(4)) {
                    let mut bytes = [0; 4];
                    bytes.iter_mut().zip(bools).for_each(|(byte, &b)| *byte = b.into());
                    *word = i32::from_ne_bytes(bytes);
                }
                (VFIO_IRQ_SET_DATA_BOOL, bools.len())
            }
            IrqData::EventFd(fds) => {
                for (word, fd) in arg.data[..fds.len()].iter_mut().zip(fds) {
                    *word = fd.map_or(-1, |fd| fd.as_raw_fd());
                }
                (VFIO_IRQ_SET_DATA_EVENTFD, size_of_val(&arg.data[..fds.len()]))
            }
        };
        let argsz = args.argsz.unwrap_or((size_of_val(&arg.head) + size) as u32);
        arg.head = [argsz, args.action | data_flag, args.index, args.start, args.count];
        // SAFETY: The kernel only reads: the head, and data for `count` interrupts if the device has
        // as many. What it might read behind `arg` is returned to nobody.
        unsafe { self.ioctl("VFIO_DEVICE_SET_IRQS", sys::DEVICE_SET_IRQS, &mut arg) }
    }
}

/// Interrupts there may be data for.
const ROOM: usize = 1024;

#[repr(C)]
struct Argument {
    head: [u32; 5],
    data: [i32; ROOM],
}
