with

raw_users as (

    select * from {{ source('raw', 'raw_users') }}

),

final as (

    select
        user_id,
        name,
        email,
        phone_number,
        created_date,
        source,
        ingested_at,
        change_xid
    from raw_users

)

select * from final
