with

users as (

    select * from {{ ref('stg_users') }}

),

final as (

    select
        user_id,
        name,
        email,
        phone_number,
        created_date,
        source
    from users

)

select * from final
