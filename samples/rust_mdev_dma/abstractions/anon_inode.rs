// SPDX-License-Identifier: GPL-2.0

//! Files without a name.
//!
//! C header: [`include/linux/anon_inodes.h`](srctree/include/linux/anon_inodes.h)

use crate::bindings;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, from_result},
    fs::File,
    prelude::*,
    sync::{poll::PollTable, Arc, ArcBorrow},
    types::ForeignOwnable,
    uaccess::{UserPtr, UserSlice, UserSliceReader, UserSliceWriter},
    ModuleMetadata,
};

/// What a file that has no position does.
///
/// # Examples
///
/// ```
/// struct Zero;
///
/// #[vtable]
/// impl StreamOperations for Zero {
///     fn read(&self, buf: UserSliceWriter) -> Result<usize> {
///         let len = buf.len();
///         buf.fill_zero()?;
///         Ok(len)
///     }
/// }
///
/// fn zero() -> Result<StreamFile> {
///     StreamFile::new(c"zero", Arc::new(Zero, GFP_KERNEL)?, bindings::O_RDONLY)
/// }
/// ```
#[vtable]
pub(crate) trait StreamOperations: Send + Sync + Sized + 'static {
    /// The module that has these operations: the file holds a reference to it.
    type OwnerModule: ModuleMetadata;

    /// Reads from the file, returns the number of bytes.
    fn read(&self, _buf: UserSliceWriter) -> Result<usize> {
        Err(EINVAL)
    }

    /// Writes to the file, returns the number of bytes.
    fn write(&self, _buf: UserSliceReader) -> Result<usize> {
        Err(EINVAL)
    }

    /// The events that are ready, after those to wait for have been registered with `table`.
    fn poll(&self, _file: &File, _table: PollTable<'_>) -> u32 {
        bindings::POLLIN | bindings::POLLOUT | bindings::POLLRDNORM | bindings::POLLWRNORM
    }

    /// An ioctl.
    fn ioctl(&self, _cmd: u32, _arg: usize) -> Result<isize> {
        Err(ENOTTY)
    }
}

/// A file without a name and without a position, not yet installed as a file descriptor.
///
/// # Invariants
///
/// `self.0` is a valid file, and this owns a reference to it.
pub(crate) struct StreamFile(NonNull<bindings::file>);

impl StreamFile {
    /// Creates a file of the class `name`, which holds a reference to `data`. `flags` is one of
    /// `O_RDONLY`, `O_WRONLY` and `O_RDWR`.
    pub(crate) fn new<T: StreamOperations>(
        name: &'static CStr,
        data: Arc<T>,
        flags: u32,
    ) -> Result<Self> {
        let data = data.into_foreign();
        // CAST: These flags are small.
        // SAFETY: `name` is a valid string. The operations are valid for as long as their module
        // is, to which the file holds a reference, and expect an `Arc<T>` as private data.
        let file = from_err_ptr(unsafe {
            bindings::anon_inode_getfile(
                name.as_char_ptr(),
                &VTable::<T>::VTABLE,
                data,
                flags as c_int,
            )
        });
        let file = match file {
            Ok(file) => file,
            Err(e) => {
                // SAFETY: There is no file that owns what `into_foreign()` returned.
                drop(unsafe { Arc::<T>::from_foreign(data) });
                return Err(e);
            }
        };
        // SAFETY: The file was just created, nothing else refers to it.
        unsafe { bindings::stream_open((*file).f_inode, file) };

        // INVARIANT: The file is valid, and the reference that it was created with is ours.
        Ok(Self(NonNull::new(file).ok_or(ENOMEM)?))
    }

    /// The file, with its reference.
    pub(crate) fn into_raw(self) -> *mut bindings::file {
        core::mem::ManuallyDrop::new(self).0.as_ptr()
    }
}

impl Drop for StreamFile {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this owns a reference.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}

/// The C callbacks of a file.
struct VTable<T: StreamOperations>(PhantomData<T>);

impl<T: StreamOperations> VTable<T> {
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
    /// `file` was created by [`StreamFile::new`] with a `T`, and isn't released for `'a`.
    unsafe fn data<'a>(file: *mut bindings::file) -> ArcBorrow<'a, T> {
        // SAFETY: The private data is what `into_foreign()` returned for the `Arc<T>` that the file
        // owns, and the caller promises that the file isn't released for `'a`.
        unsafe { Arc::borrow((*file).private_data) }
    }

    /// # Safety
    ///
    /// `file` was created by [`StreamFile::new`] with a `T`, and isn't released before this
    /// returns.
    unsafe extern "C" fn read_callback(
        file: *mut bindings::file,
        buf: *mut c_char,
        count: usize,
        _ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The caller promises what this needs.
        let data = unsafe { Self::data(file) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), count).writer();
        // CAST: The size of a user's buffer fits an `isize`.
        from_result(|| Ok(data.read(buf)? as isize))
    }

    /// # Safety
    ///
    /// As for [`Self::read_callback`].
    unsafe extern "C" fn write_callback(
        file: *mut bindings::file,
        buf: *const c_char,
        count: usize,
        _ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The caller promises what this needs.
        let data = unsafe { Self::data(file) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast_mut().cast()), count).reader();
        // CAST: The size of a user's buffer fits an `isize`.
        from_result(|| Ok(data.write(buf)? as isize))
    }

    /// # Safety
    ///
    /// As for [`Self::read_callback`], and `table` is null or valid.
    unsafe extern "C" fn poll_callback(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The caller promises what this needs.
        let data = unsafe { Self::data(file) };
        // SAFETY: The caller promises that the file is valid, and stream files have no position
        // for an `fdget_pos()` to protect. `table` is null or valid.
        unsafe { data.poll(File::from_raw_file(file), PollTable::from_raw(table)) }
    }

    /// # Safety
    ///
    /// As for [`Self::read_callback`].
    unsafe extern "C" fn ioctl_callback(
        file: *mut bindings::file,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_long {
        // SAFETY: The caller promises what this needs.
        let data = unsafe { Self::data(file) };
        from_result(|| data.ioctl(cmd, arg))
    }

    /// # Safety
    ///
    /// `file` was created by [`StreamFile::new`] with a `T`, and nothing else refers to it.
    unsafe extern "C" fn release_callback(
        _inode: *mut bindings::inode,
        file: *mut bindings::file,
    ) -> c_int {
        // SAFETY: The private data is what `into_foreign()` returned for the `Arc<T>` that the file
        // owns, and the caller promises that nothing uses the file any more.
        drop(unsafe { Arc::<T>::from_foreign((*file).private_data) });
        0
    }
}
