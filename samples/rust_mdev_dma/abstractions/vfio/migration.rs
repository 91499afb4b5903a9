// SPDX-License-Identifier: GPL-2.0

//! Migration of VFIO devices: `VFIO_DEVICE_FEATURE_MIGRATION` with `STOP_COPY`, `PRE_COPY` and
//! `P2P`.
//!
//! For the migration states see [`include/uapi/linux/vfio.h`](srctree/include/uapi/linux/vfio.h).
//! This has the parts that don't depend on the device: the arcs between states, and the data
//! transfer sessions with their files.

use super::{Device, OpenDevice, Operations};
use crate::bindings;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, from_result, to_result},
    fs::File,
    new_mutex,
    prelude::*,
    static_lock_class,
    sync::{
        poll::{PollCondVarBox, PollTable},
        Arc, ArcBorrow, Mutex,
    },
    types::ForeignOwnable,
    uaccess::{UserPtr, UserSlice, UserSliceReader, UserSliceWriter},
    ModuleMetadata,
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

/// The migration state of a device.
pub(super) struct Migration {
    /// `VFIO_DEVICE_STATE_*`
    state: u32,
    /// The data transfer session, in the states that have one.
    session: Option<Arc<Session>>,
}

impl Migration {
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
            session.set_phase(Phase::Ended);
        }
    }

    /// Takes a device to `state`, along the arcs that VFIO selects.
    fn set_state<T: Operations>(&mut self, at: At<'_, T>, state: u32) -> Result<Option<DataFile>> {
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
    fn take_arc<T: Operations>(&mut self, at: At<'_, T>, next: u32) -> Result<Option<DataFile>> {
        let At { dev, driver } = at;
        match (self.state, next) {
            (RUNNING, RUNNING_P2P) | (PRE_COPY, PRE_COPY_P2P) => driver.quiesce(dev),
            (RUNNING_P2P, RUNNING) | (PRE_COPY_P2P, PRE_COPY) => driver.resume(dev),
            (RUNNING_P2P, STOP) | (STOP, RUNNING_P2P) => (),
            (RUNNING, PRE_COPY) | (RUNNING_P2P, PRE_COPY_P2P) => {
                let mut data = KVVec::new();
                driver.save_identity(&mut data)?;
                return self.begin_session::<T>(Phase::PreCopy, data).map(Some);
            }
            (PRE_COPY_P2P, STOP_COPY) => {
                let session = self.session.as_ref().ok_or(EINVAL)?;
                session.append(Phase::StopCopy, |data| driver.save(dev, data))?;
            }
            (STOP, STOP_COPY) => {
                let mut data = KVVec::new();
                driver.save_identity(&mut data)?;
                driver.save(dev, &mut data)?;
                return self.begin_session::<T>(Phase::StopCopy, data).map(Some);
            }
            (STOP, RESUMING) => {
                return self
                    .begin_session::<T>(Phase::Resuming, KVVec::new())
                    .map(Some)
            }
            (RESUMING, STOP) => {
                let session = self.session.take().ok_or(EINVAL)?;
                let data = session.set_phase(Phase::Ended);
                // After a failure the device is reset, which isn't what the user asked for.
                driver
                    .load(dev, &data)
                    .inspect_err(|_| self.state = ERROR)?;
            }
            (PRE_COPY, RUNNING) | (PRE_COPY_P2P, RUNNING_P2P) | (STOP_COPY, STOP) => {
                self.end_session()
            }
            _ => return Err(EINVAL),
        }
        Ok(None)
    }

    fn begin_session<T: Operations>(&mut self, phase: Phase, data: KVVec<u8>) -> Result<DataFile> {
        let session = Arc::pin_init(Session::new(phase, data), GFP_KERNEL_ACCOUNT)?;
        let file = DataFile::new::<T>(session.clone(), phase)?;
        self.session = Some(session);
        Ok(file)
    }
}

/// A device, and its driver's side.
struct At<'a, T: Operations> {
    dev: &'a OpenDevice<T>,
    driver: Pin<&'a T>,
}

impl<T: Operations> Clone for At<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Operations> Copy for At<'_, T> {}

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
struct Session {
    /// # Locking
    ///
    /// Held across copies from and to the user, so taken before `mmap_lock`, and across
    /// [`Operations::save`], so taken before the locks of the driver; after `migration`.
    #[pin]
    stream: Mutex<Stream>,
    /// Waiters for a change of the phase, which includes more to read.
    changed: PollCondVarBox,
}

struct Stream {
    phase: Phase,
    data: KVVec<u8>,
    /// Number of bytes that were read.
    read: usize,
}

impl Session {
    fn new(phase: Phase, data: KVVec<u8>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            stream <- new_mutex!(Stream { phase, data, read: 0 }, "vfio::Session::stream"),
            changed: PollCondVarBox::new(c"vfio::Session::changed", static_lock_class!())?,
        })
    }

    /// Sets the phase. Returns the data if that is [`Phase::Ended`], else nothing.
    fn set_phase(&self, phase: Phase) -> KVVec<u8> {
        let mut stream = self.stream.lock();
        stream.phase = phase;
        self.changed.notify_all();
        match phase {
            Phase::Ended => core::mem::take(&mut stream.data),
            _ => KVVec::new(),
        }
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

    fn read(&self, mut buf: UserSliceWriter) -> Result<usize> {
        let mut stream = self.stream.lock();
        let rest = stream.data.get(stream.read..).unwrap_or_default();
        let part = &rest[..rest.len().min(buf.len())];
        match stream.phase {
            Phase::PreCopy if rest.is_empty() => return Err(ENOMSG),
            Phase::PreCopy | Phase::StopCopy => buf.write_slice(part)?,
            Phase::Resuming | Phase::Ended => return Err(ENODEV),
        }
        let len = part.len();
        stream.read += len;
        Ok(len)
    }

    fn write(&self, buf: UserSliceReader, max: usize) -> Result<usize> {
        let mut stream = self.stream.lock();
        if stream.phase != Phase::Resuming {
            return Err(ENODEV);
        }
        let len = buf.len();
        if len > max.saturating_sub(stream.data.len()) {
            return Err(EFBIG);
        }
        let before = stream.data.len();
        if let Err(e) = buf.read_all(&mut stream.data, GFP_KERNEL_ACCOUNT) {
            stream.data.truncate(before);
            return Err(e);
        }
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
            stream.data.len() - stream.read
        };
        let mut writer = UserSlice::new(UserPtr::from_addr(arg), SIZE).writer();
        writer.write(&argsz)?;
        writer.write(&0u32)?;
        writer.write(&(initial as u64))?;
        writer.write(&0u64)
    }
}

/// The file of a data transfer session, not yet installed as a file descriptor of the user.
///
/// # Invariants
///
/// `self.0` is a valid file, and this owns a reference to it.
struct DataFile(NonNull<bindings::file>);

impl DataFile {
    fn new<T: Operations>(session: Arc<Session>, phase: Phase) -> Result<Self> {
        let flags = match phase {
            Phase::Resuming => bindings::O_WRONLY,
            _ => bindings::O_RDONLY,
        };
        let session = session.into_foreign();
        // SAFETY: The file holds a reference to the module that has the operations. They expect a
        // session as private data.
        let file = from_err_ptr(unsafe {
            bindings::anon_inode_getfile(
                c"vfio-migration".as_char_ptr(),
                &FileVTable::<T>::VTABLE,
                session,
                flags as c_int,
            )
        });
        let file = match file {
            Ok(file) => file,
            Err(e) => {
                // SAFETY: There is no file that owns it.
                drop(unsafe { Arc::<Session>::from_foreign(session) });
                return Err(e);
            }
        };
        // SAFETY: The file was just created, nothing else refers to it.
        unsafe { bindings::stream_open((*file).f_inode, file) };

        // INVARIANT: As above.
        Ok(Self(NonNull::new(file).ok_or(ENOMEM)?))
    }

    fn into_raw(self) -> *mut bindings::file {
        core::mem::ManuallyDrop::new(self).0.as_ptr()
    }
}

impl Drop for DataFile {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this owns a reference.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}

/// The file operations of a [`DataFile`].
struct FileVTable<T: Operations>(PhantomData<T>);

impl<T: Operations> FileVTable<T> {
    const VTABLE: bindings::file_operations = {
        let mut ops: bindings::file_operations = pin_init::zeroed();
        ops.owner = T::OwnerModule::THIS_MODULE.as_ptr();
        ops.read = Some(Self::read_callback);
        ops.write = Some(Self::write_callback);
        ops.poll = Some(Self::poll_callback);
        ops.unlocked_ioctl = Some(Self::ioctl_callback);
        ops.compat_ioctl = bindings::compat_ptr_ioctl;
        ops.release = Some(Self::release_callback);
        ops
    };

    /// # Safety
    ///
    /// `file` was created by [`DataFile::new`], and isn't released for `'a`.
    unsafe fn session<'a>(file: *mut bindings::file) -> ArcBorrow<'a, Session> {
        // SAFETY: The private data is a session that the file owns a reference to.
        unsafe { Arc::borrow((*file).private_data) }
    }

    /// # Safety
    ///
    /// Called by the VFS only, with a data file.
    unsafe extern "C" fn read_callback(
        file: *mut bindings::file,
        buf: *mut c_char,
        count: usize,
        _ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The file isn't released while it is read.
        let session = unsafe { Self::session(file) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), count).writer();
        from_result(|| Ok(session.read(buf)? as isize))
    }

    /// # Safety
    ///
    /// Called by the VFS only, with a data file.
    unsafe extern "C" fn write_callback(
        file: *mut bindings::file,
        buf: *const c_char,
        count: usize,
        _ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The file isn't released while it is written.
        let session = unsafe { Self::session(file) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast_mut().cast()), count).reader();
        from_result(|| Ok(session.write(buf, T::max_saved_size())? as isize))
    }

    /// # Safety
    ///
    /// Called by the VFS only, with a data file and its poll table, which may be null.
    unsafe extern "C" fn poll_callback(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The file isn't released while it is polled.
        let session = unsafe { Self::session(file) };
        // SAFETY: The file is valid, and stream files have no position. `table` is null or valid.
        unsafe { session.poll(File::from_raw_file(file), PollTable::from_raw(table)) }
    }

    /// # Safety
    ///
    /// Called by the VFS only, with a data file.
    unsafe extern "C" fn ioctl_callback(
        file: *mut bindings::file,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        const GET_PRECOPY_INFO: u32 = super::vfio_ioctl(21);

        // SAFETY: The file isn't released while it is used.
        let session = unsafe { Self::session(file) };
        from_result(|| match cmd {
            GET_PRECOPY_INFO => session.precopy_info(arg).map(|()| 0),
            _ => Err(ENOTTY),
        })
    }

    /// # Safety
    ///
    /// Called by the VFS only, when the last reference to a data file is dropped.
    unsafe extern "C" fn release_callback(
        _inode: *mut bindings::inode,
        file: *mut bindings::file,
    ) -> c_int {
        // SAFETY: This is the reference that `DataFile::new` gave to the file.
        drop(unsafe { Arc::<Session>::from_foreign((*file).private_data) });
        0
    }
}

/// The C callbacks of a driver.
pub(super) struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    pub(super) const VTABLE: bindings::vfio_migration_ops = bindings::vfio_migration_ops {
        migration_set_state: Some(Self::set_state_callback),
        migration_get_state: Some(Self::get_state_callback),
        migration_get_data_size: Some(Self::get_data_size_callback),
    };

    /// # Safety
    ///
    /// `vdev` is embedded in a `Device<T>` that is open, with `driver` initialised, for `'a`.
    unsafe fn at<'a>(vdev: *mut bindings::vfio_device) -> At<'a, T> {
        // SAFETY: As the caller promises.
        let dev = unsafe { Device::<T>::open_from_raw(vdev) };
        // SAFETY: As the caller promises.
        let driver = unsafe { dev.0.driver() };
        At { dev, driver }
    }

    /// # Safety
    ///
    /// Called by VFIO only, with an open device.
    unsafe extern "C" fn set_state_callback(
        vdev: *mut bindings::vfio_device,
        state: bindings::vfio_device_mig_state,
    ) -> *mut bindings::file {
        // SAFETY: The device is open, as long as this callback runs.
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
    /// Called by VFIO only, with an open device and a valid pointer `state`.
    unsafe extern "C" fn get_state_callback(
        vdev: *mut bindings::vfio_device,
        state: *mut bindings::vfio_device_mig_state,
    ) -> c_int {
        // SAFETY: The device is open, as long as this callback runs.
        let at = unsafe { Self::at(vdev) };
        // SAFETY: VFIO passes a valid pointer.
        unsafe { *state = at.dev.migration().state };
        0
    }

    /// # Safety
    ///
    /// Called by VFIO only, with an open device and a valid pointer `length`.
    unsafe extern "C" fn get_data_size_callback(
        vdev: *mut bindings::vfio_device,
        length: *mut c_ulong,
    ) -> c_int {
        // SAFETY: The device is open, as long as this callback runs.
        let At { dev, driver } = unsafe { Self::at(vdev) };
        // SAFETY: VFIO passes a valid pointer.
        unsafe { *length = driver.saved_size(dev) };
        0
    }
}
