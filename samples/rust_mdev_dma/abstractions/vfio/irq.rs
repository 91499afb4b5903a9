// SPDX-License-Identifier: GPL-2.0

//! Interrupts of a VFIO device that is a PCI function, signalled through eventfds.
//!
//! `VFIO_DEVICE_SET_IRQS` has the effects and errors that it has for vfio-pci, see
//! [`drivers/vfio/pci/vfio_pci_intrs.c`](srctree/drivers/vfio/pci/vfio_pci_intrs.c), but a call
//! that fails has no effect.

use super::{
    ioctl::{read_words, write_words},
    virqfd::Unmasker,
    OpenDevice, Operations,
};
use crate::{abstractions::eventfd::EventFd, bindings};
use core::ops::Range;
use kernel::{
    error::to_result,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};

/// An interrupt index.
#[derive(Clone, Copy)]
enum Index {
    IntX,
    Msi,
    Err,
    Req,
    /// Without interrupts.
    Empty,
}

impl Index {
    fn new(index: u32) -> Result<Self> {
        match index {
            bindings::VFIO_PCI_INTX_IRQ_INDEX => Ok(Self::IntX),
            bindings::VFIO_PCI_MSI_IRQ_INDEX => Ok(Self::Msi),
            bindings::VFIO_PCI_MSIX_IRQ_INDEX => Ok(Self::Empty),
            bindings::VFIO_PCI_ERR_IRQ_INDEX => Ok(Self::Err),
            bindings::VFIO_PCI_REQ_IRQ_INDEX => Ok(Self::Req),
            _ => Err(EINVAL),
        }
    }

    /// Number of interrupts.
    fn count(self, msi_vectors: usize) -> usize {
        match self {
            Self::Msi => msi_vectors,
            Self::IntX | Self::Err | Self::Req => 1,
            Self::Empty => 0,
        }
    }

    /// `VFIO_IRQ_INFO_*`
    fn flags(self) -> u32 {
        match self {
            Self::IntX => {
                bindings::VFIO_IRQ_INFO_EVENTFD
                    | bindings::VFIO_IRQ_INFO_MASKABLE
                    | bindings::VFIO_IRQ_INFO_AUTOMASKED
            }
            Self::Msi | Self::Err | Self::Req => {
                bindings::VFIO_IRQ_INFO_EVENTFD | bindings::VFIO_IRQ_INFO_NORESIZE
            }
            Self::Empty => 0,
        }
    }
}

/// `VFIO_DEVICE_GET_IRQ_INFO`: `struct vfio_irq_info`.
pub(super) fn get_irq_info(arg: usize, msi_vectors: usize) -> Result {
    let mut words = [0; 4];
    read_words(arg, &mut words)?;
    let [argsz, _, number, _] = words;
    let index = Index::new(number)?;
    // CAST: A PCI function has at most 32 vectors of MSI.
    let count = index.count(msi_vectors) as u32;
    write_words(arg, &[argsz, index.flags(), number, count])
}

/// The data of a [`SetIrqs`]: one element for each interrupt of its range, or none.
enum Data {
    None,
    Bool(KVec<u8>),
    EventFd(KVec<(i32, Option<EventFd>)>),
}

/// A call of `VFIO_DEVICE_SET_IRQS`: `struct vfio_irq_set`.
///
/// # Invariants
///
/// `range` is within the interrupts of the index. `data` has one element for each of it, or none.
pub(super) struct SetIrqs {
    index: Index,
    action: u32,
    range: Range<usize>,
    data: Data,
}

impl SetIrqs {
    /// Reads the argument of the ioctl, and takes references to its eventfds.
    pub(super) fn from_user(arg: usize, msi_vectors: usize) -> Result<Self> {
        let mut words = [0; 5];
        read_words(arg, &mut words)?;
        let [argsz, flags, number, start, count] = words;
        let index = Index::new(number)?;

        let mut header = bindings::vfio_irq_set {
            argsz,
            flags,
            index: number,
            start,
            count,
            ..Default::default()
        };
        let mut size = 0;
        // CAST: Both are small numbers of interrupts.
        // SAFETY: Both pointers are valid, and `header` was read from the user.
        to_result(unsafe {
            bindings::vfio_set_irqs_validate_and_prepare(
                &mut header,
                index.count(msi_vectors) as c_int,
                bindings::VFIO_PCI_NUM_IRQS as c_int,
                &mut size,
            )
        })?;

        let data = UserPtr::from_addr(arg.wrapping_add(size_of_val(&words)));
        // INVARIANT: `vfio_set_irqs_validate_and_prepare()` has checked the range and the size of
        // the data.
        Ok(Self {
            index,
            action: flags & bindings::VFIO_IRQ_SET_ACTION_TYPE_MASK,
            // CAST: From 32 bits to at least as many. Their sum is at most the number of interrupts.
            range: start as usize..start.saturating_add(count) as usize,
            data: match flags & bindings::VFIO_IRQ_SET_DATA_TYPE_MASK {
                bindings::VFIO_IRQ_SET_DATA_BOOL => Data::Bool(read_bools(data, size)?),
                bindings::VFIO_IRQ_SET_DATA_EVENTFD => Data::EventFd(read_eventfds(data, count)?),
                _ => Data::None,
            },
        })
    }

    /// Applies the call to a device. The caller holds `irq_setup`.
    pub(super) fn apply<T: Operations>(self, dev: &OpenDevice<T>, setup: &IrqSetup<T>) -> Result {
        match (self.index, self.action, &self.data) {
            (Index::IntX, bindings::VFIO_IRQ_SET_ACTION_UNMASK, Data::EventFd(eventfds)) => {
                dev.interrupts().check_intx(&self)?;
                match eventfds.first() {
                    Some(&(fd, Some(_))) => setup.unmasker.enable(fd)?,
                    _ => setup.unmasker.disable(),
                }
                return Ok(());
            }
            (Index::IntX, bindings::VFIO_IRQ_SET_ACTION_TRIGGER, Data::None)
                if self.range.is_empty() =>
            {
                setup.unmasker.disable()
            }
            _ => (),
        }
        dev.interrupts().set(self)
    }

    /// Whether this selects the `i`th interrupt of the range for its action.
    fn selects(&self, i: usize) -> bool {
        match &self.data {
            Data::None => true,
            Data::Bool(bools) => bools.get(i).is_some_and(|&b| b != 0),
            Data::EventFd(_) => false,
        }
    }
}

fn read_bools(data: UserPtr, size: usize) -> Result<KVec<u8>> {
    let mut bools = KVec::new();
    UserSlice::new(data, size).read_all(&mut bools, GFP_KERNEL_ACCOUNT)?;
    Ok(bools)
}

fn read_eventfds(data: UserPtr, count: u32) -> Result<KVec<(i32, Option<EventFd>)>> {
    let mut reader =
        UserSlice::new(data, (count as usize).saturating_mul(size_of::<i32>())).reader();
    let mut eventfds = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
    for _ in 0..count {
        let fd = reader.read::<i32>()?;
        let eventfd = match fd {
            -1 => None,
            0.. => Some(EventFd::from_fd(fd)?),
            _ => return Err(EINVAL),
        };
        eventfds.push((fd, eventfd), GFP_KERNEL_ACCOUNT)?;
    }
    Ok(eventfds)
}

/// Protected by `irq_setup`, which serialises calls of `VFIO_DEVICE_SET_IRQS`.
pub(super) struct IrqSetup<T: Operations> {
    pub(super) unmasker: Unmasker<T>,
}

/// The interrupt mode: INTx or MSI, not both.
enum Mode {
    Disabled,
    IntX {
        trigger: Option<EventFd>,
        /// Set by the user, or when INTx is signalled; cleared by the user.
        masked: bool,
    },
    Msi(KVec<Option<EventFd>>),
}

/// The interrupts of a device.
pub(crate) struct Interrupts {
    /// Whether the device asserts INTx.
    asserted: bool,
    mode: Mode,
    err: Option<EventFd>,
    req: Option<EventFd>,
}

impl Interrupts {
    pub(super) fn new() -> Self {
        Self {
            asserted: false,
            mode: Mode::Disabled,
            err: None,
            req: None,
        }
    }

    /// Asserts or deasserts INTx. While asserted, it signals the user once per unmask.
    pub(crate) fn assert_intx(&mut self, asserted: bool) {
        self.asserted = asserted;
        self.deliver_intx();
    }

    /// Signals a vector, or vector 0 if the user hasn't enabled that one.
    pub(crate) fn send_msi(&mut self, vector: usize) {
        if let Mode::Msi(vectors) = &self.mode {
            let trigger = vectors.get(vector).or(vectors.first());
            signal(trigger.and_then(Option::as_ref));
        }
    }

    /// Signals the user to release the device.
    pub(super) fn request(&self) {
        signal(self.req.as_ref());
    }

    fn deliver_intx(&mut self) {
        if let Mode::IntX { trigger, masked } = &mut self.mode {
            if self.asserted && !*masked {
                *masked = true;
                signal(trigger.as_ref());
            }
        }
    }

    /// Applies a call of `VFIO_DEVICE_SET_IRQS`.
    pub(super) fn set(&mut self, set: SetIrqs) -> Result {
        match (set.index, set.action) {
            (Index::IntX, bindings::VFIO_IRQ_SET_ACTION_MASK) => self.mask_intx(&set, true),
            (Index::IntX, bindings::VFIO_IRQ_SET_ACTION_UNMASK) => self.mask_intx(&set, false),
            (Index::IntX, bindings::VFIO_IRQ_SET_ACTION_TRIGGER) => self.trigger_intx(set),
            (Index::Msi, bindings::VFIO_IRQ_SET_ACTION_TRIGGER) => self.trigger_msi(set),
            (Index::Err, bindings::VFIO_IRQ_SET_ACTION_TRIGGER) => {
                trigger_single(&mut self.err, set)
            }
            (Index::Req, bindings::VFIO_IRQ_SET_ACTION_TRIGGER) => {
                trigger_single(&mut self.req, set)
            }
            _ => Err(ENOTTY),
        }
    }

    /// Fails with `EINVAL` if INTx isn't enabled, or the range isn't its one interrupt.
    fn check_intx(&self, set: &SetIrqs) -> Result {
        let enabled = matches!(self.mode, Mode::IntX { .. });
        (enabled && set.range == (0..1)).then_some(()).ok_or(EINVAL)
    }

    fn mask_intx(&mut self, set: &SetIrqs, mask: bool) -> Result {
        self.check_intx(set)?;
        if matches!(set.data, Data::EventFd(_)) {
            return Err(ENOTTY);
        }
        if set.selects(0) {
            self.set_intx_masked(mask);
        }
        Ok(())
    }

    /// Unmasks INTx, which signals it if it is asserted.
    #[cfg(CONFIG_VFIO_VIRQFD)]
    pub(super) fn unmask_intx(&mut self) {
        self.set_intx_masked(false);
    }

    fn set_intx_masked(&mut self, mask: bool) {
        if let Mode::IntX { masked, .. } = &mut self.mode {
            *masked = mask;
            self.deliver_intx();
        }
    }

    fn trigger_intx(&mut self, set: SetIrqs) -> Result {
        if matches!(self.mode, Mode::IntX { .. })
            && matches!(set.data, Data::None)
            && set.range.is_empty()
        {
            self.mode = Mode::Disabled;
            return Ok(());
        }
        if matches!(self.mode, Mode::Msi(_)) || set.range != (0..1) {
            return Err(EINVAL);
        }
        let selects = set.selects(0);
        match (&mut self.mode, set.data) {
            (Mode::IntX { trigger, .. }, Data::EventFd(mut eventfds)) => {
                *trigger = eventfds.pop().and_then(|(_, eventfd)| eventfd);
            }
            (_, Data::EventFd(mut eventfds)) => {
                self.mode = Mode::IntX {
                    trigger: eventfds.pop().and_then(|(_, eventfd)| eventfd),
                    masked: false,
                };
                self.deliver_intx();
            }
            (Mode::IntX { trigger, .. }, _) if selects => signal(trigger.as_ref()),
            (Mode::IntX { .. }, _) => (),
            _ => return Err(EINVAL),
        }
        Ok(())
    }

    fn trigger_msi(&mut self, set: SetIrqs) -> Result {
        if matches!(self.mode, Mode::Msi(_))
            && matches!(set.data, Data::None)
            && set.range.is_empty()
        {
            self.mode = Mode::Disabled;
            return Ok(());
        }
        match &mut self.mode {
            Mode::IntX { .. } => return Err(EINVAL),
            Mode::Disabled => {
                let Data::EventFd(eventfds) = set.data else {
                    return Err(EINVAL);
                };
                if eventfds.is_empty() {
                    return Err(EINVAL);
                }
                // The first call determines the number of enabled vectors.
                let mut vectors = KVec::with_capacity(set.range.end, GFP_KERNEL_ACCOUNT)?;
                for _ in 0..set.range.start {
                    vectors.push(None, GFP_KERNEL_ACCOUNT)?;
                }
                for (_, eventfd) in eventfds {
                    vectors.push(eventfd, GFP_KERNEL_ACCOUNT)?;
                }
                self.mode = Mode::Msi(vectors);
            }
            Mode::Msi(vectors) => {
                let vectors = vectors.get_mut(set.range.clone()).ok_or(EINVAL)?;
                for (i, trigger) in vectors.iter_mut().enumerate() {
                    if set.selects(i) {
                        signal(trigger.as_ref());
                    }
                }
                if let Data::EventFd(eventfds) = set.data {
                    for (trigger, (_, eventfd)) in vectors.iter_mut().zip(eventfds) {
                        *trigger = eventfd;
                    }
                }
            }
        }
        Ok(())
    }
}

/// TRIGGER of an index with one interrupt, which is enabled while it has an eventfd.
fn trigger_single(trigger: &mut Option<EventFd>, set: SetIrqs) -> Result {
    let selects = set.selects(0);
    match set.data {
        Data::None if trigger.is_none() => return Err(EINVAL),
        Data::None if set.range.is_empty() => *trigger = None,
        _ if set.range.is_empty() => return Err(EINVAL),
        Data::EventFd(mut eventfds) => *trigger = eventfds.pop().and_then(|(_, eventfd)| eventfd),
        Data::None | Data::Bool(_) if selects => signal(trigger.as_ref()),
        Data::None | Data::Bool(_) => (),
    }
    Ok(())
}

fn signal(trigger: Option<&EventFd>) {
    if let Some(trigger) = trigger {
        trigger.signal();
    }
}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_irq)]
mod tests {
    use super::*;

    const VECTORS: usize = 4;

    fn set(index: Index, action: u32, range: Range<usize>, data: Data) -> SetIrqs {
        SetIrqs {
            index,
            action,
            range,
            data,
        }
    }

    /// A TRIGGER with so many eventfds, all of which are -1.
    fn eventfds(index: Index, range: Range<usize>) -> Result<SetIrqs> {
        let mut none = KVec::new();
        for _ in range.clone() {
            none.push((-1, None), GFP_KERNEL)?;
        }
        let data = Data::EventFd(none);
        Ok(set(
            index,
            bindings::VFIO_IRQ_SET_ACTION_TRIGGER,
            range,
            data,
        ))
    }

    fn trigger(index: Index, range: Range<usize>) -> SetIrqs {
        let action = bindings::VFIO_IRQ_SET_ACTION_TRIGGER;
        set(index, action, range, Data::None)
    }

    fn mask(action: u32, range: Range<usize>, data: Data) -> SetIrqs {
        set(Index::IntX, action, range, data)
    }

    fn vectors(interrupts: &Interrupts) -> Option<usize> {
        match &interrupts.mode {
            Mode::Msi(vectors) => Some(vectors.len()),
            _ => None,
        }
    }

    fn masked(interrupts: &Interrupts) -> Option<bool> {
        match interrupts.mode {
            Mode::IntX { masked, .. } => Some(masked),
            _ => None,
        }
    }

    #[test]
    fn counts_of_indices() {
        let count = |number| Index::new(number).map(|index| index.count(VECTORS));
        assert_eq!(count(bindings::VFIO_PCI_INTX_IRQ_INDEX), Ok(1));
        assert_eq!(count(bindings::VFIO_PCI_MSI_IRQ_INDEX), Ok(VECTORS));
        assert_eq!(count(bindings::VFIO_PCI_MSIX_IRQ_INDEX), Ok(0));
        assert_eq!(count(bindings::VFIO_PCI_ERR_IRQ_INDEX), Ok(1));
        assert_eq!(count(bindings::VFIO_PCI_REQ_IRQ_INDEX), Ok(1));
        assert_eq!(count(bindings::VFIO_PCI_NUM_IRQS), Err(EINVAL));
        assert!(Index::IntX.flags() & bindings::VFIO_IRQ_INFO_MASKABLE != 0);
        assert!(Index::Msi.flags() & bindings::VFIO_IRQ_INFO_NORESIZE != 0);
        assert_eq!(Index::Empty.flags(), 0);
    }

    #[test]
    fn what_a_call_selects() -> Result {
        let mut bools = KVec::new();
        for value in [0, 1, 2] {
            bools.push(value, GFP_KERNEL)?;
        }
        let action = bindings::VFIO_IRQ_SET_ACTION_TRIGGER;
        let set = set(Index::Msi, action, 0..3, Data::Bool(bools));
        assert!(!set.selects(0) && set.selects(1) && set.selects(2) && !set.selects(3));
        assert!(trigger(Index::Msi, 0..1).selects(0));
        assert!(!eventfds(Index::Msi, 0..1)?.selects(0));
        Ok(())
    }

    #[test]
    fn the_first_call_says_how_many_vectors() -> Result {
        let mut interrupts = Interrupts::new();
        assert_eq!(interrupts.set(trigger(Index::Msi, 0..1)), Err(EINVAL));
        assert_eq!(interrupts.set(eventfds(Index::Msi, 1..1)?), Err(EINVAL));
        interrupts.set(eventfds(Index::Msi, 1..3)?)?;
        assert_eq!(vectors(&interrupts), Some(3));
        interrupts.set(eventfds(Index::Msi, 0..3)?)?;
        interrupts.set(trigger(Index::Msi, 2..3))?;
        assert_eq!(interrupts.set(eventfds(Index::Msi, 3..4)?), Err(EINVAL));
        assert_eq!(interrupts.set(trigger(Index::Msi, 2..4)), Err(EINVAL));
        assert_eq!(vectors(&interrupts), Some(3));
        interrupts.send_msi(VECTORS);
        interrupts.set(trigger(Index::Msi, 0..0))?;
        assert_eq!(vectors(&interrupts), None);
        Ok(())
    }

    #[test]
    fn intx_or_msi_and_not_both() -> Result {
        let mut interrupts = Interrupts::new();
        interrupts.set(eventfds(Index::Msi, 0..1)?)?;
        assert_eq!(interrupts.set(eventfds(Index::IntX, 0..1)?), Err(EINVAL));
        interrupts.set(trigger(Index::Msi, 0..0))?;
        interrupts.set(eventfds(Index::IntX, 0..1)?)?;
        assert_eq!(interrupts.set(eventfds(Index::Msi, 0..1)?), Err(EINVAL));
        assert_eq!(masked(&interrupts), Some(false));
        interrupts.set(trigger(Index::IntX, 0..0))?;
        assert_eq!(masked(&interrupts), None);
        Ok(())
    }

    #[test]
    fn intx_masks_itself_while_it_is_asserted() -> Result {
        let unmask = bindings::VFIO_IRQ_SET_ACTION_UNMASK;
        let mut interrupts = Interrupts::new();
        let early = mask(unmask, 0..1, Data::None);
        assert_eq!(interrupts.set(early), Err(EINVAL));
        interrupts.set(eventfds(Index::IntX, 0..1)?)?;
        interrupts.assert_intx(true);
        assert_eq!(masked(&interrupts), Some(true));
        interrupts.set(mask(unmask, 0..1, Data::None))?;
        assert_eq!(masked(&interrupts), Some(true));
        interrupts.assert_intx(false);
        interrupts.set(mask(unmask, 0..1, Data::None))?;
        assert_eq!(masked(&interrupts), Some(false));
        let action = bindings::VFIO_IRQ_SET_ACTION_MASK;
        assert_eq!(interrupts.set(mask(action, 0..0, Data::None)), Err(EINVAL));
        interrupts.set(mask(action, 0..1, Data::None))?;
        assert_eq!(masked(&interrupts), Some(true));
        let fds = mask(action, 0..1, Data::EventFd(KVec::new()));
        assert_eq!(interrupts.set(fds), Err(ENOTTY));
        Ok(())
    }

    #[test]
    fn err_and_req_have_one() -> Result {
        for index in [Index::Err, Index::Req] {
            let mut interrupts = Interrupts::new();
            assert_eq!(interrupts.set(trigger(index, 0..1)), Err(EINVAL));
            assert_eq!(interrupts.set(eventfds(index, 0..0)?), Err(EINVAL));
            interrupts.set(eventfds(index, 0..1)?)?;
            interrupts.request();
            let action = bindings::VFIO_IRQ_SET_ACTION_MASK;
            let refused = set(index, action, 0..1, Data::None);
            assert_eq!(interrupts.set(refused), Err(ENOTTY));
        }
        Ok(())
    }
}
