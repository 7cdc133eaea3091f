-- A difference that stays after `finpro transform` came around change_xid: `finpro transform --full-refresh` ends it.
with

fact as (

    select
        order_id,
        user_id,
        product_id,
        quantity,
        amount_numeric,
        created_date,
        status,
        array_to_string(reasons, ',') as reasons
    from {{ ref('fct_orders') }}

),

loaded as (

    select
        order_id,
        user_id,
        product_id,
        quantity,
        amount_numeric,
        created_date,
        status,
        array_to_string(reasons, ',') as reasons
    from {{ ref('stg_orders') }}

)

(
    select * from loaded
    except distinct
    select * from fact
)
union all
(
    select * from fact
    except distinct
    select * from loaded
)
