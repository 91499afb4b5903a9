// SPDX-License-Identifier: GPL-2.0

//! Migration of VFIO devices: `VFIO_DEVICE_FEATURE_MIGRATION` with `STOP_COPY`, `PRE_COPY` and
//! `P2P`.
//!
//! For the migration states see [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h).
//! This has the parts that don't depend on the device: the arcs between states, and the data
//! transfer sessions with their files.

use super::{ioctl::vfio_ioctl, Device, OpenDevice, Operations};
use crate::{
    abstractions::anon_inode::{StreamFile, StreamOperations},
    bindings,
};
use core::marker::PhantomData;
use kernel::{
    error::to_result,
    fs::File,
    new_mutex,
    prelude::*,
    static_lock_class,
    sync::{
        poll::{PollCondVarBox, PollTable},
        Arc, Mutex,
    },
    uaccess::{UserPtr, UserSlice, UserSliceReader, UserSliceWriter},
};

use bindings::{
    vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR as ERROR,
    vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY as PRE_COPY,
    vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P as PRE_COPY_P2P,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING as RESUMING,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING as RUNNING,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P as RUNNING_P2P,
    vfio_device_mig_state_VFIO_DEVICE_STATE_STOP as STOP,
    vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY as STOP_COPY,
};

/// The supported features: `VFIO_MIGRATION_*`.
pub(super) const FLAGS: u32 = bindings::VFIO_MIGRATION_STOP_COPY
    | bindings::VFIO_MIGRATION_PRE_COPY
    | bindings::VFIO_MIGRATION_P2P;

/// Operations of the driver of a device that can be migrated.
///
/// These methods and [`Operations::reset`] don't run concurrently. A device can be migrated if
/// [`Parts::with_migration`](super::Parts::with_migration) says so.
///
/// # Examples
///
/// ```
/// impl MigrationOperations for MyDevice {
///     fn quiesce(self: Pin<&Self>, dev: &OpenDevice<Self>) {
///         self.running.store(false, Relaxed);
///         dev.stop_work();
///     }
///
///     fn save(self: Pin<&Self>, _dev: &OpenDevice<Self>, stream: &mut KVVec<u8>) -> Result {
///         Ok(stream.extend_from_slice(&self.counter.lock().to_le_bytes(), GFP_KERNEL_ACCOUNT)?)
///     }
///     // ...
/// }
/// ```
pub(crate) trait MigrationOperations: Operations {
    /// Quiesces the device: when this returns, it does no DMA and doesn't interrupt until
    /// [`Self::resume`]. Operations in progress have completed, or continue then.
    fn quiesce(self: Pin<&Self>, dev: &OpenDevice<Self>);

    /// Sets the device running, after [`Self::quiesce`].
    fn resume(self: Pin<&Self>, dev: &OpenDevice<Self>);

    /// Appends the part of the migration data that can be read in pre-copy, while the device still
    /// runs, to `stream`.
    fn save_identity(self: Pin<&Self>, stream: &mut KVVec<u8>) -> Result;

    /// Appends the rest of the migration data to `stream`. The device is quiesced.
    fn save(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &mut KVVec<u8>) -> Result;

    /// Loads the migration data that [`Self::save_identity`] and [`Self::save`] wrote. The device
    /// is quiesced and stays so. If this fails the device is reset, but still quiesced.
    fn load(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &[u8]) -> Result<(), LoadError>;

    /// Size of what [`Self::save_identity`] and [`Self::save`] would write now.
    fn saved_size(self: Pin<&Self>, dev: &OpenDevice<Self>) -> usize;

    /// Maximum size of what [`Self::load`] accepts.
    fn max_saved_size(self: Pin<&Self>, dev: &OpenDevice<Self>) -> usize;
}

/// Why [`MigrationOperations::load`] failed.
pub(crate) enum LoadError {
    /// The data isn't valid, or not for this device: nothing can be made of it. The device goes to
    /// ERROR.
    Invalid(Error),
    /// What the data asks for was refused for now, e.g. for lack of memory or a mapping, or by a
    /// signal. The device stays in RESUMING, with its data, and the user may try again.
    Refused(Error),
}

/// The migration state of a device.
pub(super) struct Migration<T: Operations> {
    /// `VFIO_DEVICE_STATE_*`
    state: u32,
    /// The data transfer session, in the states that have one.
    session: Option<Arc<Session<T>>>,
}

impl<T: Operations> Migration<T> {
    /// The initial state, RUNNING.
    pub(super) fn new() -> Self {
        Self {
            state: RUNNING,
            session: None,
        }
    }

    /// Ends a session in progress, and goes to RUNNING. The caller resets or closes the device.
    pub(super) fn reset(&mut self) {
        self.end_session();
        self.state = RUNNING;
    }

    fn end_session(&mut self) {
        if let Some(session) = self.session.take() {
            session.end();
        }
    }
}

impl<T: MigrationOperations> Migration<T> {
    /// Takes a device to `state`, along the arcs that VFIO selects.
    fn set_state(&mut self, at: At<'_, T>, state: u32) -> Result<Option<StreamFile>> {
        // `vfio_mig_get_next_state()` has a `WARN_ON` for devices in ERROR.
        if self.state == ERROR {
            return Err(EINVAL);
        }
        let mut file = None;
        while self.state != state {
            let mut next = ERROR;
            // SAFETY: The device is valid, and so is the pointer to `next`.
            to_result(unsafe {
                bindings::vfio_mig_get_next_state(
                    at.dev.as_raw().as_ptr(),
                    self.state,
                    state,
                    &mut next,
                )
            })?;
            file = self.take_arc(at, next)?;
            self.state = next;
        }
        // An arc that returns a file is always the last.
        Ok(file)
    }

    /// Takes a device along one of the arcs of `vfio_mig_get_next_state()`.
    fn take_arc(&mut self, at: At<'_, T>, next: u32) -> Result<Option<StreamFile>> {
        let At { dev, driver } = at;
        match (self.state, next) {
            (RUNNING, RUNNING_P2P) | (PRE_COPY, PRE_COPY_P2P) => driver.quiesce(dev),
            (RUNNING_P2P, RUNNING) | (PRE_COPY_P2P, PRE_COPY) => driver.resume(dev),
            (RUNNING_P2P, STOP) | (STOP, RUNNING_P2P) => (),
            (RUNNING, PRE_COPY) | (RUNNING_P2P, PRE_COPY_P2P) => {
                let mut data = KVVec::new();
                driver.save_identity(&mut data)?;
                return self.begin_session(at, Phase::PreCopy, data).map(Some);
            }
            (PRE_COPY_P2P, STOP_COPY) => {
                let session = self.session.as_ref().ok_or(EINVAL)?;
                session.append(Phase::StopCopy, |data| driver.save(dev, data))?;
            }
            (STOP, STOP_COPY) => {
                let mut data = KVVec::new();
                driver.save_identity(&mut data)?;
                driver.save(dev, &mut data)?;
                return self.begin_session(at, Phase::StopCopy, data).map(Some);
            }
            (STOP, RESUMING) => {
                return self
                    .begin_session(at, Phase::Resuming, KVVec::new())
                    .map(Some)
            }
            (RESUMING, STOP) => {
                let session = self.session.as_ref().ok_or(EINVAL)?;
                match session.with_data(|data| driver.load(dev, data)) {
                    Ok(()) => self.end_session(),
                    Err(LoadError::Refused(e)) => return Err(e),
                    Err(LoadError::Invalid(e)) => {
                        self.end_session();
                        // The device is reset, which isn't what the user asked for.
                        self.state = ERROR;
                        return Err(e);
                    }
                }
            }
            (PRE_COPY, RUNNING) | (PRE_COPY_P2P, RUNNING_P2P) | (STOP_COPY, STOP) => {
                self.end_session()
            }
            _ => return Err(EINVAL),
        }
        Ok(None)
    }

    fn begin_session(
        &mut self,
        at: At<'_, T>,
        phase: Phase,
        data: KVVec<u8>,
    ) -> Result<StreamFile> {
        let flags = match phase {
            Phase::Resuming => bindings::O_WRONLY,
            _ => bindings::O_RDONLY,
        };
        let max_size = at.driver.max_saved_size(at.dev);
        let session = Arc::pin_init(Session::new(phase, data, max_size), GFP_KERNEL_ACCOUNT)?;
        let file = StreamFile::new(c"vfio-migration", session.clone(), flags)?;
        self.session = Some(session);
        Ok(file)
    }
}

/// A device, and its driver's side.
struct At<'a, T: MigrationOperations> {
    dev: &'a OpenDevice<T>,
    driver: Pin<&'a T>,
}

impl<T: MigrationOperations> Clone for At<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: MigrationOperations> Copy for At<'_, T> {}

/// Maximum number of bytes that one call reads or writes.
const COPY: usize = 1 << 16;

/// The phase of a data transfer session.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The user reads the data, and more will be appended.
    PreCopy,
    /// The user reads the data, which is complete.
    StopCopy,
    /// The user writes the data.
    Resuming,
    /// The session has ended: reads and writes fail with `ENODEV`.
    Ended,
}

/// A data transfer session: migration data that the user reads from, or writes to, a file.
#[pin_data]
struct Session<T> {
    /// # Locking
    ///
    /// Held across [`MigrationOperations::save`] and [`MigrationOperations::load`], so taken before
    /// the locks of the driver; after `migration`. Not held across copies from and to the user: a
    /// page fault may take as long as another process likes, and reset and close take this.
    #[pin]
    stream: Mutex<Stream>,
    /// Waiters for a change of the phase, which includes more to read.
    changed: PollCondVarBox,
    /// Maximum size of the data.
    max_size: usize,
    _driver: PhantomData<fn(T)>,
}

struct Stream {
    phase: Phase,
    data: KVVec<u8>,
    /// Number of bytes that were read.
    read: usize,
}

impl<T: Operations> Session<T> {
    fn new(phase: Phase, data: KVVec<u8>, max_size: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            stream <- new_mutex!(Stream { phase, data, read: 0 }, "vfio::Session::stream"),
            changed: PollCondVarBox::new(c"vfio::Session::changed", static_lock_class!())?,
            max_size,
            _driver: PhantomData,
        })
    }

    /// Sets the phase to [`Phase::Ended`], and drops the data.
    fn end(&self) {
        let mut stream = self.stream.lock();
        stream.phase = Phase::Ended;
        stream.data = KVVec::new();
        self.changed.notify_all();
    }

    /// Calls `load` with the data.
    fn with_data<R>(&self, load: impl FnOnce(&[u8]) -> R) -> R {
        load(&self.stream.lock().data)
    }

    /// Appends what `save` writes, and sets the phase.
    fn append(&self, phase: Phase, save: impl FnOnce(&mut KVVec<u8>) -> Result) -> Result {
        let mut stream = self.stream.lock();
        let before = stream.data.len();
        if let Err(e) = save(&mut stream.data) {
            stream.data.truncate(before);
            return Err(e);
        }
        stream.phase = phase;
        self.changed.notify_all();
        Ok(())
    }

    /// `VFIO_MIG_GET_PRECOPY_INFO`: `struct vfio_precopy_info`. Pre-copy has initial bytes only, no
    /// dirty bytes.
    fn precopy_info(&self, arg: usize) -> Result {
        const SIZE: usize = size_of::<bindings::vfio_precopy_info>();

        let argsz = UserSlice::new(UserPtr::from_addr(arg), size_of::<u32>())
            .reader()
            .read::<u32>()?;
        if (argsz as usize) < SIZE {
            return Err(EINVAL);
        }
        let initial = {
            let stream = self.stream.lock();
            if stream.phase != Phase::PreCopy {
                return Err(EINVAL);
            }
            stream.data.len().saturating_sub(stream.read)
        };
        let mut writer = UserSlice::new(UserPtr::from_addr(arg), SIZE).writer();
        writer.write(&argsz)?;
        writer.write(&0u32)?;
        writer.write(&(initial as u64))?;
        writer.write(&0u64)
    }
}

#[vtable]
impl<T: Operations> StreamOperations for Session<T> {
    type OwnerModule = T::OwnerModule;

    fn read(&self, mut buf: UserSliceWriter) -> Result<usize> {
        let mut part = KVVec::new();
        let (start, end) = {
            let mut stream = self.stream.lock();
            let rest = stream.data.get(stream.read..).unwrap_or_default();
            match stream.phase {
                Phase::PreCopy if rest.is_empty() => return Err(ENOMSG),
                Phase::PreCopy | Phase::StopCopy => (),
                Phase::Resuming | Phase::Ended => return Err(ENODEV),
            }
            let len = rest.len().min(buf.len()).min(COPY);
            part.extend_from_slice(rest.get(..len).unwrap_or_default(), GFP_KERNEL_ACCOUNT)?;
            let start = stream.read;
            stream.read = start.saturating_add(len);
            (start, stream.read)
        };
        if let Err(e) = buf.write_slice(&part) {
            // So it is read next, unless others have read on.
            let mut stream = self.stream.lock();
            if stream.read == end {
                stream.read = start;
            }
            return Err(e);
        }
        Ok(part.len())
    }

    fn write(&self, mut buf: UserSliceReader) -> Result<usize> {
        let check = |stream: &Stream, len: usize| {
            if stream.phase != Phase::Resuming {
                return Err(ENODEV);
            }
            if len > self.max_size.saturating_sub(stream.data.len()) {
                return Err(EFBIG);
            }
            Ok(())
        };
        check(&self.stream.lock(), buf.len())?;
        let len = buf.len().min(COPY);
        let mut part = KVVec::from_elem(0, len, GFP_KERNEL_ACCOUNT)?;
        buf.read_slice(&mut part)?;
        let mut stream = self.stream.lock();
        check(&stream, len)?;
        stream.data.extend_from_slice(&part, GFP_KERNEL_ACCOUNT)?;
        Ok(len)
    }

    fn poll(&self, file: &File, table: PollTable<'_>) -> u32 {
        table.register_wait(file, &self.changed);
        let stream = self.stream.lock();
        match stream.phase {
            Phase::PreCopy if stream.read == stream.data.len() => 0,
            Phase::PreCopy | Phase::StopCopy => bindings::POLLIN | bindings::POLLRDNORM,
            Phase::Resuming => bindings::POLLOUT | bindings::POLLWRNORM,
            Phase::Ended => bindings::POLLERR | bindings::POLLHUP,
        }
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        const GET_PRECOPY_INFO: u32 = vfio_ioctl(21);

        match cmd {
            GET_PRECOPY_INFO => self.precopy_info(arg).map(|()| 0),
            _ => Err(ENOTTY),
        }
    }
}

/// The C callbacks of a driver.
pub(super) struct VTable<T: MigrationOperations>(PhantomData<T>);

impl<T: MigrationOperations> VTable<T> {
    pub(super) const VTABLE: bindings::vfio_migration_ops = bindings::vfio_migration_ops {
        migration_set_state: Some(Self::set_state_callback),
        migration_get_state: Some(Self::get_state_callback),
        migration_get_data_size: Some(Self::get_data_size_callback),
    };

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, for `'a`.
    unsafe fn at<'a>(vdev: *mut bindings::vfio_device) -> At<'a, T> {
        // SAFETY: The caller promises that the device is open.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: The caller promises that `driver` is initialised.
        let driver = unsafe { dev.0.driver() };
        At { dev, driver }
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns.
    unsafe extern "C" fn set_state_callback(
        vdev: *mut bindings::vfio_device,
        state: bindings::vfio_device_mig_state,
    ) -> *mut bindings::file {
        // SAFETY: The caller promises that the device is open and `driver` initialised.
        let at = unsafe { Self::at(vdev) };
        let result = at.dev.migration().set_state(at, state);
        match result {
            Ok(Some(file)) => file.into_raw(),
            Ok(None) => core::ptr::null_mut(),
            Err(e) => e.to_ptr(),
        }
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns. `state` is valid for writes.
    unsafe extern "C" fn get_state_callback(
        vdev: *mut bindings::vfio_device,
        state: *mut bindings::vfio_device_mig_state,
    ) -> c_int {
        // SAFETY: The caller promises that the device is open and `driver` initialised.
        let at = unsafe { Self::at(vdev) };
        // SAFETY: The caller promises that `state` is valid for writes.
        unsafe { *state = at.dev.migration().state };
        0
    }

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, until this
    /// returns. `length` is valid for writes.
    unsafe extern "C" fn get_data_size_callback(
        vdev: *mut bindings::vfio_device,
        length: *mut c_ulong,
    ) -> c_int {
        // SAFETY: The caller promises that the device is open and `driver` initialised.
        let At { dev, driver } = unsafe { Self::at(vdev) };
        // SAFETY: The caller promises that `length` is valid for writes.
        unsafe { *length = driver.saved_size(dev) };
        0
    }
}
